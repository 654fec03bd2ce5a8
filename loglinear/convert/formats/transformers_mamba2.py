"""Mamba2ForCausalLM of transformers. Source: its `modeling_mamba2.py`."""

from __future__ import annotations

from loglinear.convert.layouts import ZERO_BIAS, Sizes, mamba2_model
from loglinear.convert.source import Options, Tensors
from loglinear.convert.target import Converted
from loglinear.variants import HeadSizes


def read(options: Options, tensors: Tensors) -> Converted:
    """Return the model in our terms; ValueError for an option or a tensor that does not fit."""
    heads = HeadSizes(
        num_heads=options.size("num_heads", 128),
        num_groups=options.size("n_groups", 8),
        key_dim=options.size("state_size", 128),
        head_dim=options.size("head_dim", 64),
    )
    sizes = Sizes(
        vocab_size=options.size("vocab_size", 32_768),
        hidden_size=options.size("hidden_size", 4096),
        num_layers=options.size("num_hidden_layers", 64),
        heads=heads,
        conv_kernel=options.size("conv_kernel", 4),
        eps=options.get("layer_norm_epsilon", float, 1e-5),
        tied=options.get("tie_word_embeddings", bool, False),
    )
    conv_bias = options.get("use_conv_bias", bool, True)
    options.expect("use_bias", False)
    options.expect("hidden_act", "silu", "swish")
    options.expect("time_step_limit", [0.0, float("inf")])
    options.expect("rms_norm", True)
    options.ignore("expand", "time_step_rank", "time_step_min", "time_step_max", "time_step_floor")
    options.ignore("rescale_prenorm_residual", "residual_in_fp32", "chunk_size", "layer_types")
    options.ignore("norm_before_gate", "intermediate_size")  # Codestral has them; the model's code does not read them
    weights = mamba2_model(tensors, sizes, conv_bias=conv_bias)
    tokens = options.tokens(bos_token_id=0, eos_token_id=2, pad_token_id=1)
    return Converted(sizes.fields("mamba2", intermediate_size=0, **tokens), weights, [] if conv_bias else [ZERO_BIAS])
