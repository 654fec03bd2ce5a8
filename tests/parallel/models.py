"""Tiny models whose loss and gradients one process and several compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loglinear import parallel
from loglinear.models import LogLinearForCausalLM
from tests.checkpointing import recompute_blocks
from tests.models.tiny_models import FULL, HYBRID, LINEAR, ROUTED, ROUTED_DELTA, TRANSFORMER, tiny_config, tokens

GDN = {"variant": "gated_delta_net"}


@dataclass(frozen=True)
class Model:
    """One model and one batch."""

    name: str
    T: int = 61
    options: dict[str, Any] = field(default_factory=dict)
    documents: tuple[int, ...] | None = None
    prepare: Callable[[LogLinearForCausalLM], None] | None = None
    """A change of the model on slices that changes no result."""
    ranks: tuple[int, ...] = (2, 3, 4)

    def make(self) -> LogLinearForCausalLM:
        torch.manual_seed(0)
        return LogLinearForCausalLM(tiny_config(**self.options)).double().train()

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        """Tokens and labels; some labels are left out."""
        ids = tokens(1 if self.documents else 2, self.T)
        return ids, ids.masked_fill(ids % 5 == 0, -100)

    def whole(self) -> dict[str, Tensor]:
        """Return the loss, the logits and every gradient from one process."""
        model, (ids, labels) = self.make(), self.batch
        boundaries = {} if self.documents is None else {"cu_seqlens": torch.tensor(self.documents)}
        output = model(ids, labels=labels, skip_logits=False, **boundaries)
        found = results(model, output, output.logits)
        return found | {"eval_logits": model.eval()(ids, **boundaries).logits.detach()}

    def sliced(self, mesh: Any, average: Callable[[Tensor], None]) -> dict[str, Tensor]:
        """Return the same from slices: gradients are averaged, as by data-parallel training."""
        model = self.make()
        if self.prepare is not None:
            self.prepare(model)
        batch = parallel.shard(model.config, mesh, *self.batch, cu_seqlens=self.documents)
        output = model(**batch, skip_logits=False)
        found = results(model, output, batch["slices"].gather(output.logits))
        for name, x in found.items():
            if name not in ("loss", "logits"):
                average(x)
        with torch.no_grad():
            logits = model.eval()(**parallel.shard(model.config, mesh, self.batch[0], cu_seqlens=self.documents)).logits
            return found | {"eval_logits": batch["slices"].gather(logits)}


def results(model: nn.Module, output: Any, logits: Tensor) -> dict[str, Tensor]:
    """Run the backward pass of the loss; return loss, logits and gradients."""
    output.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": output.loss.detach(), "logits": logits.detach(), **grads}


def checkpointed(model: LogLinearForCausalLM) -> None:
    """Compute each block again in the backward pass."""
    recompute_blocks(model)


def compiled(model: LogLinearForCausalLM) -> None:
    """Compile each block; the collectives run between the graphs."""
    for block in model.model.layers:
        block.compile(backend="aot_eager")


MODELS = {
    model.name: model
    for model in (
        Model("mamba2"),
        Model("gated_delta_net", options=GDN),
        Model("mamba2_packed", options={"num_levels": 4}, documents=(0, 2, 29, 30, 57, 61)),
        Model("gated_delta_net_packed", options=GDN, documents=(0, 40, 41, 61)),
        Model("gla", options={"variant": "gla"}, ranks=(3,)),
        Model("kimi_delta_attention", options={**GDN, "variant": "kimi_delta_attention"}, ranks=(2,)),
        Model("short_slices", 13, options={**GDN, "chunk_size": 2, "conv_kernel": 6}),
        Model("short", 5, options={"conv_kernel": 1}),
        Model("checkpointed", options={**GDN, "radix": 4, "finest_block": 4}, prepare=checkpointed, ranks=(2,)),
        Model("compiled", options=GDN, documents=(0, 40, 61), prepare=compiled, ranks=(2,)),
        Model("routed", options=ROUTED),
        Model("routed_packed", options=ROUTED_DELTA, documents=(0, 2, 29, 30, 57, 61), ranks=(2, 3)),
        Model("linear", options={"num_levels": 1}, ranks=(3,)),
        Model("hybrid", options=HYBRID),
        Model("hybrid_packed", options={**HYBRID, "layer_types": [FULL, LINEAR]}, documents=(0, 2, 29, 30, 57, 61)),
        Model("hybrid_long_first", options=HYBRID, documents=(0, 55, 61)),
        Model("hybrid_short", 5, options={**HYBRID, "num_key_value_heads": 2}),  # the last ranks hold no tokens
        Model("hybrid_short_packed", 5, options=HYBRID, documents=(0, 1, 5)),
        Model("hybrid_checkpointed", options=HYBRID, prepare=checkpointed, ranks=(2,)),
        Model("hybrid_compiled", options=HYBRID, documents=(0, 40, 61), prepare=compiled, ranks=(2,)),
        Model("transformer", 44, options=TRANSFORMER, ranks=(2, 3)),
    )
}
