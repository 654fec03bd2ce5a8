# B batch, T time, H heads, V head size
"""Falcon-H1: Mamba-2 next to attention in every layer, with multipliers, and with or without a norm of the output."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer

from loglinear.upgrades.mamba2 import UpgradedMamba2


class LogLinearFalconH1Mixer(UpgradedMamba2, FalconH1Mixer):
    """The mixer of a Falcon-H1.

    Multipliers scale its input and each part of the projection. Without `mamba_rms_norm` the output is y silu(z). With
    it the gate comes before or after the norm, as `mamba_norm_before_gate` says.
    """

    replaces = FalconH1Mixer
    mup_vector: Any
    ssm_in_multiplier: Any

    def _projections(self, x: Tensor) -> Tensor:
        projected = self.in_proj(x * self.ssm_in_multiplier)
        return (projected * self.mup_vector).to(projected.dtype)

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        return self.norm(y, z) if self.mamba_rms_norm else y * F.silu(z)


MIXERS = {"FalconH1Mixer": LogLinearFalconH1Mixer}
