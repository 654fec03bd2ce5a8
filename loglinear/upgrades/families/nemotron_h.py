"""Nemotron-H: Mamba-2, attention, experts or an MLP in each layer."""

from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from loglinear.upgrades.mamba2 import UpgradedMamba2


class LogLinearNemotronHMamba2Mixer(UpgradedMamba2, NemotronHMamba2Mixer):
    """The mixer of a Nemotron-H, whose time step is at least `time_step_min`."""

    replaces = NemotronHMamba2Mixer
    activation_option = "mamba_hidden_act"


MIXERS = {"NemotronHMamba2Mixer": LogLinearNemotronHMamba2Mixer}
