"""Kimi Linear: Kimi Delta Attention in some layers, latent attention in the others, with experts."""

from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention, KimiLinearForgetGate

from loglinear.upgrades.kimi_delta_attention import LowRankForgetGate, UpgradedKimiDeltaAttention


class LogLinearKimiLinearForgetGate(LowRankForgetGate, KimiLinearForgetGate):
    """The gate of a Kimi Linear."""


class LogLinearKimiLinearDeltaAttention(UpgradedKimiDeltaAttention, KimiLinearDeltaAttention):
    """The mixer of a Kimi Linear."""

    replaces = KimiLinearDeltaAttention
    gate_class = LogLinearKimiLinearForgetGate


MIXERS = {"KimiLinearDeltaAttention": LogLinearKimiLinearDeltaAttention}
