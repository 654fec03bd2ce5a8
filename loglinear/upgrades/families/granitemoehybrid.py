"""Granite 4 hybrids: Mamba-2 in some layers, attention in the others, with experts or without."""

from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

from loglinear.upgrades.mamba2 import UpgradedMamba2


class LogLinearGraniteMoeHybridMambaLayer(UpgradedMamba2, GraniteMoeHybridMambaLayer):
    """The mixer of a Granite hybrid."""

    replaces = GraniteMoeHybridMambaLayer
    masks_know_positions = False


MIXERS = {"GraniteMoeHybridMambaLayer": LogLinearGraniteMoeHybridMambaLayer}
