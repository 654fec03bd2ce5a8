"""The layers of the models: plain torch modules that are usable on their own."""

from loglinear.layers.attention import Attention, AttentionContext, rotary_tables
from loglinear.layers.gated_rms_norm import GatedRMSNorm
from loglinear.layers.level_scales import LambdaForm, LevelScales
from loglinear.layers.mixer import Mixer
from loglinear.layers.mixer_state import MixerDecodeState, MixerState
from loglinear.layers.packing import Packing
from loglinear.layers.routing import BucketWeights, Routing
from loglinear.layers.short_convolution import ShortConvolution
from loglinear.layers.swiglu import SwiGLU

__all__ = [
    "Attention",
    "AttentionContext",
    "BucketWeights",
    "GatedRMSNorm",
    "LambdaForm",
    "LevelScales",
    "Mixer",
    "MixerDecodeState",
    "MixerState",
    "Packing",
    "Routing",
    "ShortConvolution",
    "SwiGLU",
    "rotary_tables",
]
