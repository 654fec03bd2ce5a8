# D hidden size, G groups, H heads, K key, V value, W kernel, L levels
"""Layouts that several formats share: rows of fused projections, embeddings and feed-forward layers in our order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.convert.source import Tensors
from loglinear.variants import HeadSizes

Weights = dict[str, Tensor]
ZERO_BIAS = "the convolutions have no bias in the checkpoint: they get one of zero, which training would change"


class Sizes(NamedTuple):
    """The sizes of a model that every format has."""

    vocab_size: int
    hidden_size: int
    """D."""
    num_layers: int
    heads: HeadSizes
    conv_kernel: int
    """W."""
    eps: float
    """The epsilon of the RMS norms."""
    tied: bool
    """True if the head is the table of the embeddings."""

    def fields(self, variant: str, **own: Any) -> dict[str, Any]:
        """Return the fields of `LogLinearConfig`, together with `own`."""
        return dict(
            variant=variant,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            **self.heads._asdict(),
            conv_kernel=self.conv_kernel,
            rms_norm_eps=self.eps,
            tie_word_embeddings=self.tied,
            **own,
        )

    def ends(self, tensors: Tensors, embed: str, norm: str) -> Weights:
        """Return the weights outside the layers, whose names in the checkpoint are `embed`, `norm` and lm_head.weight.

        Raises ValueError for a tied head that differs from the embeddings, and for more layers than tensors.
        """
        self.heads.check()
        if self.num_layers > len(tensors):  # before a loop over them begins
            layers = f"{self.num_layers:,} layers, and there are {len(tensors)} tensors"
            raise ValueError(f"{tensors.folder}: config.json has {layers}")
        table = head = tensors.take(embed, self.vocab_size, self.hidden_size)
        if not self.tied or "lm_head.weight" in tensors:
            head = tensors.take("lm_head.weight", self.vocab_size, self.hidden_size)
        if self.tied and not torch.equal(head, table):
            raise ValueError(f"{tensors.folder}: lm_head.weight differs from {embed}, expected tied embeddings")
        final = tensors.take(norm, self.hidden_size)
        return {"model.embed_tokens.weight": table, "model.norm.weight": final, "lm_head.weight": head}


def mamba2_mixer(tensors: Tensors, at: str, sizes: Sizes, *, conv_bias: bool, levels: int = 0) -> Weights:
    """Return the weights of a Mamba-2 mixer, whose names in the checkpoint begin with `at`, under our names.

        in_proj  [z, x, B, C, dt, lambda] -> [z, C, B, x], and the gates and lambda apart
        conv1d   [x, B, C; 1; W]          -> [C, B, x; W]

    Without `conv_bias` the bias is zero. `levels` is L of a log-linear checkpoint, 0 of a linear one.
    """
    D, (H, G, K, V) = sizes.hidden_size, sizes.heads
    inner, keys = H * V, G * K
    rows = [inner, inner, keys, keys, H, H * levels]
    z, x, b, c, dt, lam = tensors.take(f"{at}in_proj.weight", sum(rows), D).split(rows)
    conv = tensors.take(f"{at}conv1d.weight", inner + 2 * keys, 1, sizes.conv_kernel).squeeze(1)
    bias = tensors.take(f"{at}conv1d.bias", len(conv)) if conv_bias else conv.new_zeros(len(conv))
    ours = {
        "in_proj.weight": torch.cat([z, c, b, x]),
        "conv.weight": torch.cat([*reversed(conv.split([inner, keys, keys]))]),
        "conv.bias": torch.cat([*reversed(bias.split([inner, keys, keys]))]),
        "variant.gates.weight": dt,
        "variant.gate_bias.A_log": tensors.take(f"{at}A_log", H),
        "variant.gate_bias.dt_bias": tensors.take(f"{at}dt_bias", H),
        "variant.skip_bias.D": tensors.take(f"{at}D", H),
        "norm.weight": tensors.take(f"{at}norm.weight", inner),
        "out_proj.weight": tensors.take(f"{at}out_proj.weight", D, inner),
    }
    if levels:
        ours["level_scales.proj.weight"] = lam
        ours["level_scales.level_bias.L"] = tensors.take(f"{at}L", H, levels)
    return ours


def under(prefix: str, weights: Weights) -> Weights:
    """Return the same weights with a prefix before their names."""
    return {prefix + name: weight for name, weight in weights.items()}
