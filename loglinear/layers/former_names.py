"""Names that a mixer's parameters had in earlier checkpoints, which still load."""

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
"""former name: name, both inside a `Mixer`"""


def current_name(name: str) -> str:
    """The name now of a model's parameter, whose mixers are called `mixer`."""
    layer, dot, own = name.rpartition("mixer.")
    return layer + dot + FORMER_NAMES.get(own, own) if dot else name


def rename_former(mixer: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A pre-hook of `Mixer.load_state_dict`: former names become those of now."""
    for former, name in FORMER_NAMES.items():
        if prefix + former in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + former)
