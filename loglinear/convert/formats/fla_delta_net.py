"""DeltaNetForCausalLM of flash-linear-attention. Source: `fla/models/delta_net`, `fla/layers/delta_net.py`."""

from __future__ import annotations

from loglinear.convert.formats.fla_options import Decoder
from loglinear.convert.layouts import DeltaRule
from loglinear.convert.source import Options, Tensors
from loglinear.convert.target import Converted
from loglinear.variants import HeadSizes


def read(options: Options, tensors: Tensors) -> Converted:
    """Return the model in our terms; ValueError for an option or a tensor that does not fit."""
    hidden_size, num_heads = options.size("hidden_size", 2048), options.size("num_heads", 16)
    keys, values = (options.multiple(name, hidden_size, 1.0) for name in ("expand_k", "expand_v"))
    decoder = Decoder.of(options, HeadSizes(num_heads, num_heads, keys // num_heads, values // num_heads), 24)
    layer = DeltaRule("b", options.get("use_gate", bool, False), options.get("use_short_conv", bool, True))
    options.expect("use_beta", True)
    options.expect("use_output_norm", True)
    options.expect("qk_norm", "l2")
    options.expect("qk_activation", "silu")
    weights = decoder.weights(tensors, layer.mixer)
    fields = decoder.fields(
        "delta_net",
        options,
        output_gate=layer.output_gate,
        negative_eigenvalues=options.get("allow_neg_eigval", bool, False),
    )
    return Converted(fields, weights, layer.notes)
