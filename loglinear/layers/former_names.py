"""The former names of a mixer's parameters, under which earlier checkpoints still load."""

from typing import Any

from torch import Tensor, nn

FORMER_NAMES = {
    "variant.A_log": "variant.gate_bias.A_log",
    "variant.dt_bias": "variant.gate_bias.dt_bias",
    "variant.D": "variant.skip_bias.D",
    "level_scales.weight": "level_scales.proj.weight",
    "level_scales.bias": "level_scales.proj.bias",
    "level_scales.L": "level_scales.level_bias.L",
}
"""From a former name to the current name, both inside a `Mixer`."""


def current_name(name: str) -> str:
    """Return the current name of a parameter of a model, whose mixers are called `mixer`."""
    layer, dot, own = name.rpartition("mixer.")
    return layer + dot + FORMER_NAMES.get(own, own) if dot else name


def rename_former(mixer: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Replace former names by current names, as a pre-hook of `Mixer.load_state_dict`."""
    for former, name in FORMER_NAMES.items():
        if prefix + former in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + former)
