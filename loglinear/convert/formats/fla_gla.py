# D hidden size, H heads, K key, V value
"""GLAForCausalLM of flash-linear-attention. Source: `fla/models/gla`, `fla/layers/gla.py` of that project."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.convert.formats.fla_options import Decoder
from loglinear.convert.layouts import SHARED_KEYS, Sizes, Weights
from loglinear.convert.source import Options, Tensors
from loglinear.convert.target import Converted
from loglinear.variants import HeadSizes
from loglinear.variants.gla import RANK


class _Layer(NamedTuple):
    """The choices of a GLA mixer."""

    key_value_heads: int
    """The heads of k, v and the decays, each for several heads of q."""
    output_gate: bool
    short_conv: bool
    norm: str
    """The name of the output norm."""

    @classmethod
    def of(cls, options: Options, num_heads: int) -> _Layer:
        shared = options.size_or("num_kv_heads", num_heads)
        if num_heads % shared:
            raise ValueError(f"{options.place}: num_kv_heads must divide num_heads = {num_heads}, got {shared}")
        gate = options.get("use_output_gate", bool, True)
        fused = options.get("fuse_norm", bool, True) and gate
        options.expect("elementwise_affine", True)
        options.expect("use_gk", True)
        options.expect("use_gv", False)
        options.expect("feature_map", None)
        options.expect("clamp_min", None)
        conv = options.get("use_short_conv", bool, False)
        return cls(shared, gate, conv, "g_norm_swish_gate" if fused else "g_norm")

    def mixer(self, tensors: Tensors, at: str, sizes: Sizes) -> Weights:
        """Return the weights of a mixer, whose names in the checkpoint begin with `at`, under our names.

            g_proj, q_proj, k_proj, v_proj [z, q, k, v], q_conv1d, k_conv1d, v_conv1d, gk_proj.0 and gk_proj.1

        Every head gets a copy of the keys, values and decays that it shares.
        """
        D, (H, _, K, V) = sizes.hidden_size, sizes.heads
        copies, widths = H // self.key_value_heads, {"q": K, "k": K, "v": V}

        def take(name: str, part: str, *shape: int) -> Tensor:
            """Return a tensor with the rows of one part, for each of the H heads."""
            if part == "q":
                return tensors.take(f"{at}{name}", H * K, *shape)
            rows = tensors.take(f"{at}{name}", self.key_value_heads * widths[part], *shape)
            return rows.unflatten(0, (self.key_value_heads, -1)).repeat_interleave(copies, 0).flatten(0, 1)

        gate = [tensors.take(f"{at}g_proj.weight", H * V, D)] if self.output_gate else []
        ours = {
            "in_proj.weight": torch.cat([*gate, *(take(f"{part}_proj.weight", part, D) for part in "qkv")]),
            "variant.decay_proj.0.weight": tensors.take(f"{at}gk_proj.0.weight", RANK, D),
            "variant.decay_proj.1.weight": take("gk_proj.1.weight", "k", RANK),
            "variant.decay_proj.1.bias": take("gk_proj.1.bias", "k"),
            "norm.weight": tensors.take(f"{at}{self.norm}.weight", V),
            "out_proj.weight": tensors.take(f"{at}o_proj.weight", D, H * V),
        }
        if self.short_conv:
            taps = [take(f"{part}_conv1d.weight", part, 1, sizes.conv_kernel) for part in "qkv"]
            ours["conv.weight"] = torch.cat(taps).squeeze(1)
        return ours


def read(options: Options, tensors: Tensors) -> Converted:
    """Return the model in our terms; ValueError for an option or a tensor that does not fit.

    By default it has no short convolution and no SiLU of q, k and v, like our variant.
    """
    hidden_size, heads = options.size("hidden_size", 2048), options.size("num_heads", 4)
    keys, values = options.multiple("expand_k", hidden_size, 0.5), options.multiple("expand_v", hidden_size, 1.0)
    layer = _Layer.of(options, heads)
    kernel = options.size("conv_size", 4) if layer.short_conv else 0
    decoder = Decoder.of(options, HeadSizes(heads, heads, keys // heads, values // heads), 24)
    decoder = decoder._replace(sizes=decoder.sizes._replace(conv_kernel=kernel))
    weights = decoder.weights(tensors, layer.mixer)
    fields = decoder.fields("gla", options, output_gate=layer.output_gate)
    return Converted(fields, weights, [] if layer.key_value_heads == heads else [SHARED_KEYS])
