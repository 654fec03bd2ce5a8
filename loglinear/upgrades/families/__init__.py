"""The families of transformers' models that can be upgraded, one small file for each.

A family is a subclass of `UpgradedMixer` in a file here, and one line in `FAMILIES`.
"""

import importlib

from torch import nn

from loglinear.upgrades.mixer import UpgradedMixer

FAMILIES = {
    "Qwen3NextGatedDeltaNet": "qwen3_next",
    "Qwen3_5GatedDeltaNet": "qwen3_5",
    "Qwen3_5MoeGatedDeltaNet": "qwen3_5_moe",
    "OlmoHybridGatedDeltaNet": "olmo_hybrid",
    "KimiLinearDeltaAttention": "kimi_linear",
    "BailingHybridDeltaAttention": "bailing_hybrid",
    "Glm5NextTextLinearAttention": "glm5_next",
    "Mamba2Mixer": "mamba2",
    "BambaMixer": "bamba",
    "GraniteMoeHybridMambaLayer": "granitemoehybrid",
    "FalconH1Mixer": "falcon_h1",
    "NemotronHMamba2Mixer": "nemotron_h",
    "Zamba2MambaMixer": "zamba2",
}
"""From the name of transformers' class of a mixer to the file of its family, which is imported when it is needed."""


def family_of(module: nn.Module) -> type[UpgradedMixer] | None:
    """Return the class that a module of transformers can become; None if there is none."""
    name = type(module).__name__
    if name not in FAMILIES:
        return None
    family = importlib.import_module(f"{__name__}.{FAMILIES[name]}").MIXERS[name]
    return family if type(module) is family.replaces else None
