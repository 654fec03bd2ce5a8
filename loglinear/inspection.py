# B batch, T time, H heads, L columns
"""The weights with which the layers of a model read their buckets, for pictures and questions about a trained model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loglinear.layers.token_mixer import TokenMixer
from loglinear.partition import Partition


class LayerWeights(NamedTuple):
    """The weights of one layer, as `bucket_weights` returns them."""

    name: str
    """The layer's name among the model's modules."""
    weights: Tensor
    """[B, T, H, L] in float32 (float64 for a float64 model), as the layer's operator got them."""
    partition: Partition
    """The rule that assigns past tokens to columns."""

    def buckets(self, position: int) -> list[range]:
        """Return the positions in each of the L columns, as a token at `position` of its sequence reads them.

        The weight of an empty column has no effect. ValueError for a negative position.
        """
        return self.partition.buckets(position, self.weights.shape[-1])


@torch.no_grad()
def bucket_weights(model: nn.Module, input_ids: Tensor, *, cu_seqlens: Tensor | None = None) -> list[LayerWeights]:
    """Return the weights of all log-linear layers for all tokens, in the order in which the layers run.

        o_t = sum over the columns b of w[t, b] q_t^T S_t^(b)

    w is the result: a routed read's weights, or the published lambda. One forward pass computes it without gradients
    and without a cache, eagerly even where the model is compiled. The model stays as it is.

    Args:
        model: A `LogLinearForCausalLM`, or an upgraded model of transformers. Layers of softmax attention and layers
            with one level have no weights.
        input_ids: [B, T], the tokens, on the model's device. Each row is one sequence from position 0 on.
        cu_seqlens: [n + 1], the boundaries of packed sequences (B = 1). Positions then start at 0 in each sequence.

    Returns:
        One `LayerWeights(name, weights, partition)` for each layer; weights is [B, T, H, L].

    Raises:
        ValueError: The model has no log-linear layer.
    """
    mixers = [(name, part) for name, part in model.named_modules() if isinstance(part, TokenMixer)]
    sources = [(name, mixer, mixer.bucket_weights or mixer.level_scales) for name, mixer in mixers]
    found: list[LayerWeights] = []

    def note(name: str, partition: Partition) -> Any:
        return lambda module, inputs, weights: found.append(LayerWeights(name, weights, partition))

    hooks = [source.register_forward_hook(note(name, mixer.partition)) for name, mixer, source in sources if source]
    if not hooks:
        raise ValueError(f"model must have a log-linear layer of at least 2 levels, {type(model).__name__} has none")
    boundaries = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    try:
        with torch.compiler.set_stance("force_eager"):  # code that was compiled without the hooks would not call them
            getattr(model, "base_model", model)(input_ids=input_ids, use_cache=False, **boundaries)
    finally:
        for hook in hooks:
            hook.remove()
    return found
