"""GatedDeltaNetForCausalLM of flash-linear-attention, and the log-linear model that its authors derived from it.

Source: `fla/models/gated_deltanet` and `fla/layers/gated_deltanet.py` of that project;
`hattention/modeling_h_gated_deltanet.py` of the authors' log-linear-attention.
"""

from __future__ import annotations

from loglinear.convert.formats.fla_options import Decoder
from loglinear.convert.layouts import DeltaRule, levels_of
from loglinear.convert.source import Options, Tensors
from loglinear.convert.target import Converted
from loglinear.variants import HeadSizes


def read(options: Options, tensors: Tensors) -> Converted:
    """Return the linear model in our terms; ValueError for an option or a tensor that does not fit."""
    decoder, layer = _model(options)
    weights = decoder.weights(tensors, layer.mixer)
    fields = decoder.fields(
        "gated_delta_net",
        options,
        output_gate=layer.output_gate,
        negative_eigenvalues=options.get("allow_neg_eigval", bool, False),
    )
    return Converted(fields, weights, layer.notes)


def read_authors(options: Options, tensors: Tensors) -> Converted:
    """Return the authors' log-linear model in our terms.

    They do not scale the queries: their outputs are sqrt(K) times ours. The output norm undoes this exactly if its
    epsilon is divided by K.
    """
    decoder, layer = _model(options)
    options.expect("allow_neg_eigval", False)
    first = next(n for n in range(decoder.sizes.num_layers) if n not in decoder.attention_layers)
    layer = layer._replace(levels=levels_of(tensors, f"model.layers.{first}.attn.L"))
    weights = decoder.weights(tensors, layer.mixer)
    fields = decoder.fields(
        "gated_delta_net",
        options,
        output_gate=layer.output_gate,
        num_levels=layer.levels,
        lambda_form="softplus",
        mixer_norm_eps=decoder.sizes.eps / decoder.sizes.heads.key_dim,
    )
    return Converted(fields, weights, layer.notes)


def _model(options: Options) -> tuple[Decoder, DeltaRule]:
    width, groups = options.size("head_dim", 256), options.size("num_heads", 6)
    heads = HeadSizes(
        num_heads=options.size_or("num_v_heads", groups),
        num_groups=groups,
        key_dim=width,
        head_dim=options.multiple("expand_v", width, 2.0),
    )
    options.expect("output_gate_activation", "swish", "silu")
    layer = DeltaRule("ab", options.get("use_gate", bool, True), options.get("use_short_conv", bool, True))
    return Decoder.of(options, heads, 21), layer
