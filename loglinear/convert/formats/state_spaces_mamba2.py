"""MambaLMHeadModel of state-spaces' `mamba_ssm` with Mamba-2 layers.

Source: `mamba_ssm/models/mixer_seq_simple.py`, `modules/mamba2.py` and `modules/mlp.py` of that project.
"""

from __future__ import annotations

import torch

from loglinear.convert.layouts import ZERO_BIAS, Part, Sizes, Weights, mamba2_model
from loglinear.convert.source import Options, Tensors
from loglinear.convert.target import Converted
from loglinear.variants import HeadSizes

EPS = 1e-5  # of every norm


def read(options: Options, tensors: Tensors) -> Converted:
    """Return the model in our terms; ValueError for an option or a tensor that does not fit."""
    hidden_size = options.size("d_model", 2560)
    layer = options.part("ssm_cfg")
    layer.known.add("layer")
    if layer.values.get("layer") != "Mamba2":
        raise ValueError(f"{layer.place}: layer must be 'Mamba2', got {layer.values.get('layer', 'Mamba1')!r}")
    inner, width = layer.multiple("expand", hidden_size, 2), layer.size("headdim", 64)
    sizes = Sizes(
        vocab_size=_rounded_up(options.size("vocab_size", 50_277), options.size("pad_vocab_size_multiple", 8)),
        hidden_size=hidden_size,
        num_layers=options.size("n_layer", 64),
        heads=HeadSizes(inner // width, layer.size("ngroups", 1), layer.size("d_state", 128), width),
        conv_kernel=layer.size("d_conv", 4),
        eps=EPS,
        tied=options.get("tie_embeddings", bool, True),
    )
    feed_forward = _rounded_up(options.get("d_intermediate", int, 0), 128)
    conv_bias = layer.get("conv_bias", bool, True)
    options.expect("rms_norm", True)
    options.expect("attn_layer_idx", [])
    options.expect("norm_epsilon", EPS)
    options.ignore("attn_cfg", "residual_in_fp32", "fused_add_norm", "initializer_cfg")
    layer.expect("d_ssm", None, inner)
    layer.expect("rmsnorm", True)
    layer.expect("norm_before_gate", False)
    layer.expect("D_has_hdim", False)
    layer.expect("bias", False)
    layer.expect("dt_limit", [0.0, float("inf")])
    layer.ignore("conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "chunk_size", "use_mem_eff_path")
    layer.check_all_known()
    mlp = _feed_forward(tensors, hidden_size, feed_forward) if feed_forward else None
    weights = mamba2_model(tensors, sizes, conv_bias=conv_bias, embed="embedding", feed_forward=mlp)
    fields = sizes.fields("mamba2", intermediate_size=feed_forward)
    return Converted(fields, weights, [] if conv_bias else [ZERO_BIAS])


def _feed_forward(tensors: Tensors, hidden_size: int, width: int) -> Part:
    """Return the part that reads a feed-forward layer, whose fc1 has the rows [up, gate], and its norm."""

    def read(at: str) -> Weights:
        up, gate = tensors.take(f"{at}mlp.fc1.weight", 2 * width, hidden_size).chunk(2)
        return {
            "mlp_norm.weight": tensors.take(f"{at}norm2.weight", hidden_size),
            "mlp.gate_up.weight": torch.cat([gate, up]),
            "mlp.down.weight": tensors.take(f"{at}mlp.fc2.weight", hidden_size, width),
        }

    return read


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
