"""The formats: for each library the readers of its models, one small file each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from loglinear.autoload.configuration import UpgradeConfig
from loglinear.convert.formats import (
    fla_delta_net,
    fla_gated_delta_net,
    fla_gla,
    fla_mamba2,
    state_spaces_mamba2,
    transformers_mamba2,
)
from loglinear.convert.source import Options, Tensors
from loglinear.convert.target import Converted
from loglinear.models import LogLinearConfig
from loglinear.registry import pick
from loglinear.runs.foreign import is_upgradable

OURS = (LogLinearConfig.model_type, UpgradeConfig.model_type)
Reader = Callable[[Options, Tensors], Converted]


class Format(NamedTuple):
    """A library's checkpoints."""

    readers: dict[str, Reader]
    """From the model_type of config.json to the reader. One reader under "" reads files without a model_type."""
    refused: dict[str, str] = {}
    """From a model_type to the reason why it is not read."""
    pickle: bool = False
    """True if pytorch_model.bin is read, without running code, where there are no safetensors."""

    def reader(self, options: Options) -> Reader:
        """Return the reader of a checkpoint's model; ValueError if there is none."""
        kind = options.get("model_type", str, "")
        if kind in OURS:
            raise ValueError(f"{options.place}: model_type is {kind!r}, so the model is one of this library already")
        if "" in self.readers and (not kind or "d_model" in options.values):
            return self.readers[""]
        if kind in self.refused:
            raise ValueError(f"{options.place}: model_type {kind!r} cannot be represented: {self.refused[kind]}")
        if kind not in self.readers:
            raise ValueError(
                f"{options.place}: model_type must be {_names(self.readers)}, got {kind!r}{_instead(kind, options)}"
            )
        return self.readers[kind]


FORMATS: dict[str, Format] = {
    "transformers": Format({"mamba2": transformers_mamba2.read}),
    "fla": Format(
        {
            "mamba2": fla_mamba2.read,
            "gated_deltanet": fla_gated_delta_net.read,
            "delta_net": fla_delta_net.read,
            "gla": fla_gla.read,
            "log_linear_mamba2": fla_mamba2.read_log_linear,
        },
        refused={
            "retnet": "it rotates queries and keys and has no short convolution with SiLU",
            "kda": "its output gate has a bias, which the variant kimi_delta_attention does not have",
        },
    ),
    "authors": Format({"hattention": fla_mamba2.read_authors, "h_gated_deltanet": fla_gated_delta_net.read_authors}),
    "state-spaces": Format({"": state_spaces_mamba2.read}, pickle=True),
}


def _names(readers: Iterable[str]) -> str:
    return f"one of {', '.join(readers)}" if any(readers) else "left out"


def _instead(kind: str, options: Options) -> str:
    """Return the way to convert or upgrade a model that a format does not read, or an empty text."""
    others = [name for name, library in FORMATS.items() if kind and kind in {**library.readers, **library.refused}]
    if not kind and "d_model" in options.values:
        others = ["state-spaces"]
    if others:
        return f"; this is a folder of {' or '.join(others)}: --from {' or --from '.join(others)}"
    return "; use `loglinear upgrade` for this model of transformers" if is_upgradable(kind) else ""


def get_format(name: str) -> Format:
    """Return a format; ValueError with the nearest name if there is none of that name."""
    return pick("format", FORMATS, name)
