"""The layers of the models, usable on their own: plain torch modules."""

from loglinear.layers.attention import Attention, AttentionContext, rotary_tables
from loglinear.layers.former_names import FORMER_NAMES, current_name
from loglinear.layers.gated_rms_norm import GatedRMSNorm
from loglinear.layers.level_scales import LambdaForm, LevelScales, check_finest_block, check_lambda_form
from loglinear.layers.mixer import Mixer, MixerDecodeState, MixerState
from loglinear.layers.packing import Packing, of_any_length
from loglinear.layers.short_convolution import ShortConvolution
from loglinear.layers.swiglu import SwiGLU

__all__ = [
    "Attention",
    "AttentionContext",
    "FORMER_NAMES",
    "GatedRMSNorm",
    "LambdaForm",
    "LevelScales",
    "Mixer",
    "MixerDecodeState",
    "MixerState",
    "Packing",
    "of_any_length",
    "ShortConvolution",
    "SwiGLU",
    "check_finest_block",
    "check_lambda_form",
    "current_name",
    "rotary_tables",
]
