"""The variants, one file each: the base models that log-linear attention extends.

A new variant with an existing transition needs one file here and one line in `VARIANTS`.
"""

from loglinear.registry import pick
from loglinear.variants.base import HeadBias, HeadSizes, Operands, Variant
from loglinear.variants.delta_net import DeltaNet
from loglinear.variants.gated_delta_net import GatedDeltaNet
from loglinear.variants.gla import GLA
from loglinear.variants.kimi_delta_attention import KimiDeltaAttention
from loglinear.variants.linear_attention import LinearAttention
from loglinear.variants.mamba2 import Mamba2
from loglinear.variants.retnet import RetNet
from loglinear.variants.simple_gla import SimpleGLA

VARIANTS: dict[str, type[Variant]] = {
    "linear_attention": LinearAttention,
    "retnet": RetNet,
    "simple_gla": SimpleGLA,
    "gla": GLA,
    "mamba2": Mamba2,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "kimi_delta_attention": KimiDeltaAttention,
}


def get_variant(name: str) -> type[Variant]:
    """Return the class of a variant; ValueError with the nearest name if there is none of that name."""
    return pick("variant", VARIANTS, name)


__all__ = ["VARIANTS", "HeadBias", "HeadSizes", "Operands", "Variant", "get_variant"]
