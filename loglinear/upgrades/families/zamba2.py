"""Zamba2: Mamba-2 in every layer, after shared attention in some."""

from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer

from loglinear.upgrades.mamba2 import UpgradedMamba2


class LogLinearZamba2MambaMixer(UpgradedMamba2, Zamba2MambaMixer):
    """The mixer of a Zamba2, whose time step is at least `time_step_min`."""

    replaces = Zamba2MambaMixer


MIXERS = {"Zamba2MambaMixer": LogLinearZamba2MambaMixer}
