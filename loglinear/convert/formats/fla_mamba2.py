"""Mamba2ForCausalLM and LogLinearMamba2ForCausalLM of flash-linear-attention, also as their authors wrote the latter.

Source: `fla/models/mamba2`, `fla/models/log_linear_mamba2` and `fla/layers/log_linear_mamba2.py` of that project;
`hattention/modeling_hattention.py` of the authors' log-linear-attention. Earlier versions name some options otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

from loglinear.convert.formats.fla_options import feed_forward_width
from loglinear.convert.layouts import ZERO_BIAS, Sizes, levels_of, mamba2_model, swiglu
from loglinear.convert.source import Options, Tensors
from loglinear.convert.target import Converted
from loglinear.variants import HeadSizes

OWN = ("norm_eps", "rmsnorm", "dt_limit", "D_has_hdim")  # options that transformers does not have, in this version


class _Model(NamedTuple):
    """The options of all these models."""

    sizes: Sizes
    conv_bias: bool

    @classmethod
    def of(cls, options: Options) -> _Model:
        hidden_size, width = options.size("hidden_size", 2048), options.size("head_dim", 64)
        inner = options.multiple("expand", hidden_size, 2.0)
        sizes = Sizes(
            vocab_size=options.size("vocab_size", 32_000),
            hidden_size=hidden_size,
            num_layers=options.size("num_hidden_layers", 48),
            heads=HeadSizes(inner // width, options.size("n_groups", 1), options.size("state_size", 128), width),
            conv_kernel=options.size("conv_kernel", 4),
            eps=options.get("norm_eps", float, options.get("layer_norm_epsilon", float, 1e-5)),
            tied=options.get("tie_word_embeddings", bool, False),
        )
        options.expect("num_heads", sizes.heads.num_heads)
        options.expect("use_bias", False)
        options.expect("hidden_act", "silu", "swish")
        options.expect("D_has_hdim", False)
        options.expect("norm_before_gate", False)
        options.expect("attnres_block_size", None)
        for name in ("rmsnorm", "rms_norm"):
            options.expect(name, True)
        for name in ("dt_limit", "time_step_limit"):
            options.expect(name, [0.0, float("inf")])
        options.ignore("conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "time_step_rank")
        options.ignore("time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual")
        options.ignore("residual_in_fp32", "chunk_size", "fuse_norm", "fuse_cross_entropy", "use_l2warp")
        options.ignore("fuse_linear_cross_entropy")
        return cls(sizes, options.get("use_conv_bias", bool, True))

    @property
    def notes(self) -> list[str]:
        return [] if self.conv_bias else [ZERO_BIAS]


def read(options: Options, tensors: Tensors) -> Converted:
    """Return the linear model in our terms; ValueError for an option or a tensor that does not fit.

    transformers' Mamba-2 has the same model_type and tensors, but other defaults, as for the special tokens. A folder
    without one of this library's own options is refused.
    """
    if not any(name in OWN or name.startswith("fuse_") for name in options.values):
        raise ValueError(
            f"{options.place}: no option of flash-linear-attention is there, so this is a folder of transformers: "
            "--from transformers"
        )
    model = _Model.of(options)
    weights = mamba2_model(tensors, model.sizes, conv_bias=model.conv_bias)
    tokens = options.tokens(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return Converted(model.sizes.fields("mamba2", intermediate_size=0, **tokens), weights, model.notes)


def read_log_linear(options: Options, tensors: Tensors) -> Converted:
    """Return the log-linear model in our terms; ValueError for an option or a tensor that does not fit."""
    model = _Model.of(options)
    sizes, width = model.sizes, feed_forward_width(model.sizes.hidden_size, 4)
    levels = levels_of(tensors, "backbone.layers.0.mixer.L")
    mlp = swiglu(tensors, sizes.hidden_size, width)
    weights = mamba2_model(
        tensors, sizes, conv_bias=model.conv_bias, norm="mixer_norm", levels=levels, feed_forward=mlp
    )
    fields = sizes.fields("mamba2", intermediate_size=width, num_levels=levels, lambda_form="softplus")
    fields |= options.tokens(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return Converted(fields, weights, model.notes)


def read_authors(options: Options, tensors: Tensors) -> Converted:
    """Return the authors' log-linear model, whose output norm has one group, in our terms."""
    options.expect("n_groups", 1)
    return read_log_linear(options, tensors)
