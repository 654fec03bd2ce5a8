"""The models of the decoding and memory benchmarks, and caches at any context that they never read."""

# B batch, S columns so far, G key/value heads, K head width
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loglinear.models import LogLinearCache, LogLinearConfig, LogLinearForCausalLM
from loglinear.models.cache import KeyValueLayer, LinearStateLayer
from loglinear.recipes import get_recipe

LEVELS = 18  # of a model for 131,072 tokens, at every measured context
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "log-linear Mamba-2": ("paper_mamba2", {"num_levels": LEVELS}),
    "linear Mamba-2": ("paper_mamba2", {"num_levels": 1}),
    "log-linear Gated DeltaNet": ("paper_gated_delta_net", {"num_levels": LEVELS}),
    "linear Gated DeltaNet": ("paper_gated_delta_net", {"num_levels": 1}),
    "Transformer": ("paper_transformer", {}),
}


def build(name: str, device: str, dtype: torch.dtype) -> LogLinearForCausalLM:
    """Return a model with random weights."""
    recipe, changes = MODELS[name]
    torch.manual_seed(0)
    with torch.device(device):
        config = LogLinearConfig(**{**get_recipe(recipe).model_config().to_dict(), **changes})
        model = LogLinearForCausalLM(config)
    return model.to(dtype).eval()  # type: ignore[arg-type]  # transformers wraps `to`


class ContextLayer(KeyValueLayer):
    """Keys and values of a complete context. The next token is always written to its end.

    Attention reads exactly as many columns, without a copy or a mask: the least work of a step with a key/value cache.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2] - 1

    @property
    def nbytes(self) -> int:
        assert self.keys is not None and self.values is not None
        return self.keys.nbytes + self.values.nbytes


@torch.no_grad()
def cache_at(model: LogLinearForCausalLM, rows: int, context: int, static: bool = False) -> LogLinearCache:
    """Return a cache of `rows` sequences of `context` tokens with random contents, which do not change a step's cost.

    Rows are just before the end of the context, where a token reads the most blocks. `static` makes linear layers as
    generate(cache_implementation="static") does.
    """
    config, weight = model.config, model.lm_head.weight
    cache = LogLinearCache(config, 1 << 30 if static and "linear_attention" in (config.layer_types or []) else None)
    assert config.layer_types is not None and config.num_key_value_heads and config.attention_head_dim
    if "linear_attention" in config.layer_types:
        model(torch.zeros(rows, 2, dtype=torch.long, device=weight.device), past_key_values=cache, logits_to_keep=1)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LinearStateLayer):
            assert layer.state is not None
            state = layer.state.decode.fenwick
            for part in (state.blocks, state.k, state.v):
                part.normal_(std=0.1)
            chunks = context // state.chunk_size - 1
            state.position.fill_(chunks * state.chunk_size)
            for m in range(state.blocks.shape[1] - 1):
                if not chunks >> m & 1:
                    state.blocks[:, m].zero_()
            layer.columns = layer.columns * 0 + context
        else:
            shape = (rows, config.num_key_value_heads, context + 1, config.attention_head_dim)
            keys, values = (torch.empty(shape, dtype=weight.dtype, device=weight.device).normal_() for _ in range(2))
            cache.layers[i] = ContextLayer(keys, values)
    return cache
