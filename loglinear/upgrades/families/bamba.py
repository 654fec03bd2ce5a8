"""Bamba: Mamba-2 in some layers, attention in the others."""

from transformers.models.bamba.modeling_bamba import BambaMixer

from loglinear.upgrades.mamba2 import UpgradedMamba2


class LogLinearBambaMixer(UpgradedMamba2, BambaMixer):
    """The mixer of a Bamba."""

    replaces = BambaMixer


MIXERS = {"BambaMixer": LogLinearBambaMixer}
