# D hidden size, G groups, H heads, K key, V value, W kernel, L levels
"""Layouts that several formats share: rows of fused projections, embeddings and feed-forward layers in our order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.convert.source import Tensors
from loglinear.variants import HeadSizes

Weights = dict[str, Tensor]
ZERO_BIAS = "the convolutions have no bias in the checkpoint: they get one of zero, which training would change"
SHARED_KEYS = "several heads share keys and values in the checkpoint: each gets a copy, which training would change"
NO_CONVOLUTION = "the checkpoint has no short convolutions: each gets one tap of one, which training would change"


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


Part = Callable[[str], Weights]
"""From the beginning of a layer's names in the checkpoint to weights under our names inside the layer."""


def mamba2_model(
    tensors: Tensors,
    sizes: Sizes,
    *,
    conv_bias: bool,
    embed: str = "embeddings",
    norm: str = "norm",
    levels: int = 0,
    feed_forward: Part | None = None,
) -> Weights:
    """Return the weights of a whole Mamba-2 model, whose layers are `backbone.layers.N` in the checkpoint.

    `embed` and `norm` are the names of the embeddings and of the norm before a mixer. `levels` is L of a log-linear
    checkpoint, 0 of a linear one. Without `conv_bias` the biases of the convolutions are zero.
    """
    weights = sizes.ends(tensors, f"backbone.{embed}.weight", "backbone.norm_f.weight")
    for layer in range(sizes.num_layers):
        at, ours = f"backbone.layers.{layer}.", f"model.layers.{layer}."
        weights[f"{ours}mixer_norm.weight"] = tensors.take(f"{at}{norm}.weight", sizes.hidden_size)
        mixer = _mamba2_mixer(tensors, f"{at}mixer.", sizes, conv_bias=conv_bias, levels=levels)
        weights |= under(f"{ours}mixer.", mixer) | under(ours, {} if feed_forward is None else feed_forward(at))
    return weights


def _mamba2_mixer(tensors: Tensors, at: str, sizes: Sizes, *, conv_bias: bool, levels: int) -> Weights:
    """Return the weights of a Mamba-2 mixer, whose names in the checkpoint begin with `at`, under our names.

        in_proj  [z, x, B, C, dt, lambda] -> [z, C, B, x], and the gates and lambda apart
        conv1d   [x, B, C; 1; W]          -> [C, B, x; W]

    Without `conv_bias` the bias is zero.
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
        "variant.gates.weight": dt.clone(),  # a view would keep the whole projection in memory
        "variant.gate_bias.A_log": tensors.take(f"{at}A_log", H),
        "variant.gate_bias.dt_bias": tensors.take(f"{at}dt_bias", H),
        "variant.skip_bias.D": tensors.take(f"{at}D", H),
        "norm.weight": tensors.take(f"{at}norm.weight", inner),
        "out_proj.weight": tensors.take(f"{at}out_proj.weight", D, inner),
    }
    if levels:
        ours["level_scales.proj.weight"] = lam.clone()
        ours["level_scales.level_bias.L"] = tensors.take(f"{at}L", H, levels)
    return ours


class DeltaRule(NamedTuple):
    """The choices of a delta-rule mixer in the layout of flash-linear-attention."""

    gates: str
    """The letters of the projections of its gates, in our order: "ab" or "b"."""
    output_gate: bool
    short_conv: bool
    levels: int = 0
    """L of a log-linear checkpoint, 0 of a linear one."""

    @property
    def notes(self) -> list[str]:
        return [] if self.short_conv else [NO_CONVOLUTION]

    def mixer(self, tensors: Tensors, at: str, sizes: Sizes) -> Weights:
        """Return the weights of a mixer, whose names in the checkpoint begin with `at`, under our names.

            g_proj, q_proj, k_proj, v_proj [z, q, k, v], a_proj and b_proj [a, b], q_conv1d, k_conv1d, v_conv1d

        Without short convolutions the taps are one.
        """
        D, (H, G, K, V) = sizes.hidden_size, sizes.heads
        widths = {"g": H * V} if self.output_gate else {}
        widths |= {"q": G * K, "k": G * K, "v": H * V}
        projections = {name: tensors.take(f"{at}{name}_proj.weight", width, D) for name, width in widths.items()}
        if self.short_conv:
            taps = [tensors.take(f"{at}{part}_conv1d.weight", widths[part], 1, sizes.conv_kernel) for part in "qkv"]
        else:
            taps = [projections["q"].new_ones(widths[part], 1, 1) for part in "qkv"]
        ours = {
            "in_proj.weight": torch.cat([*projections.values()]),
            "conv.weight": torch.cat(taps).squeeze(1),
            "variant.gates.weight": torch.cat([tensors.take(f"{at}{gate}_proj.weight", H, D) for gate in self.gates]),
            "norm.weight": tensors.take(f"{at}o_norm.weight", V),
            "out_proj.weight": tensors.take(f"{at}o_proj.weight", D, H * V),
        }
        if "a" in self.gates:
            ours["variant.gate_bias.A_log"] = tensors.take(f"{at}A_log", H)
            ours["variant.gate_bias.dt_bias"] = tensors.take(f"{at}dt_bias", H)
        if self.levels:
            ours["level_scales.proj.weight"] = tensors.take(f"{at}l_proj.weight", H * self.levels, D)
            ours["level_scales.level_bias.L"] = tensors.take(f"{at}L", H, self.levels)
        return ours


def swiglu(tensors: Tensors, hidden_size: int, width: int) -> Part:
    """Return the part that reads a feed-forward layer with gate_proj, up_proj and down_proj, and its norm."""

    def read(at: str) -> Weights:
        gate, up = (tensors.take(f"{at}mlp.{name}_proj.weight", width, hidden_size) for name in ("gate", "up"))
        return {
            "mlp_norm.weight": tensors.take(f"{at}mlp_norm.weight", hidden_size),
            "mlp.gate_up.weight": torch.cat([gate, up]),
            "mlp.down.weight": tensors.take(f"{at}mlp.down_proj.weight", hidden_size, width),
        }

    return read


def levels_of(tensors: Tensors, name: str) -> int:
    """Return L of a log-linear checkpoint, the second size of its tensor `name` [H, L]."""
    if name not in tensors or tensors.left[name].dim() != 2:
        raise ValueError(f"{tensors.folder}: {name} is missing or no matrix, expected the level weights [H, L]")
    levels = tensors.left[name].shape[1]
    if levels < 2:
        raise ValueError(f"{tensors.folder}: {name} is {list(tensors.left[name].shape)}, expected at least 2 levels")
    return levels


def under(prefix: str, weights: Weights) -> Weights:
    """Return the same weights with a prefix before their names."""
    return {prefix + name: weight for name, weight in weights.items()}
