"""Mamba-2 of transformers."""

from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from loglinear.upgrades.mamba2 import UpgradedMamba2


class LogLinearMamba2Mixer(UpgradedMamba2, Mamba2Mixer):
    """The mixer of a Mamba-2."""

    replaces = Mamba2Mixer


MIXERS = {"Mamba2Mixer": LogLinearMamba2Mixer}
