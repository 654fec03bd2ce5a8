"""A foreign checkpoint: the options of its config.json and its tensors, each of which a format must account for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig

from loglinear.runs.foreign import GENERATION, NOTES, hub_hint, weight_files
from loglinear.runs.json_files import fits, read_object, type_name

PICKLE = "pytorch_model.bin"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Fields of every configuration of transformers, none of which changes the logits of the models that are read.
COMMON = {
    *PreTrainedConfig().to_dict(),
    *NOTES,
    *GENERATION,
    *("torch_dtype", "auto_map", "use_cache", "initializer_range"),
    *("tokenizer_class", "is_decoder", "torchscript", "use_bfloat16"),  # of earlier versions
}
LARGEST = 2**31 - 1  # of a size
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Options:
    """The options of a foreign config.json. A format reads, expects or ignores each of them.

    `check_all_known` then refuses the others, because an unknown option may change the logits. Every method raises
    ValueError, in one line, that names the file, the option, its value and the expected one.
    """

    def __init__(self, place: str, values: Mapping[str, Any]) -> None:
        self.place, self.values = place, {name: _decoded(value) for name, value in values.items()}
        self.known: set[str] = set()

    @classmethod
    def of(cls, folder: Path) -> Options:
        """Return the options of a folder's config.json."""
        if not (folder / "config.json").is_file():
            raise ValueError(f"no checkpoint at {folder}: expected a folder with config.json{hub_hint(folder)}")
        return cls(str(folder / "config.json"), read_object(folder / "config.json"))

    def get(self, name: str, hint: Any, default: Any) -> Any:
        """Return the value of an option, which has the annotated type; the library's default without a value."""
        self.known.add(name)
        value = self.values.get(name, default)
        if not fits(value, hint) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{self.place}: {name} must be {type_name(hint)}, got {value!r}")
        return value

    def size(self, name: str, default: int) -> int:
        """Return the value of an option that is an integer from 1 to LARGEST."""
        value = self.get(name, int, default)
        if not 1 <= value <= LARGEST:
            raise ValueError(f"{self.place}: {name} must lie between 1 and {LARGEST}, got {value}")
        return value

    def size_or(self, name: str, default: int) -> int:
        """Return the value of an option that is such an integer, or null for the default."""
        self.known.add(name)
        return default if self.values.get(name) is None else self.size(name, default)

    def multiple(self, name: str, size: int, default: float) -> int:
        """Return `size` times the value of an option, which the library rounds to an integer."""
        factor = self.get(name, float, default)
        if not 0 < factor <= LARGEST:
            raise ValueError(f"{self.place}: {name} must be positive and at most {LARGEST}, got {factor}")
        return round(factor * size)

    def part(self, name: str) -> Options:
        """Return the options inside an object, with the same checks."""
        return Options(f"{self.place}: {name}", self.get(name, dict, {}))

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuse an option whose value is not allowed. The first one is the library's default."""
        self.known.add(name)
        value = self.values.get(name, allowed[0])
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"{self.place}: {name} = {value!r} cannot be represented, expected {expected}")

    def ignore(self, *names: str) -> None:
        """Accept every value of these options: they change training, speed or rounding alone."""
        self.known.update(names)

    def tokens(self, **defaults: int | None) -> dict[str, Any]:
        """Return the ids of special tokens. The end of a sequence may have several."""
        ids = {}
        for name in TOKENS:
            several = list if name == "eos_token_id" else int
            ids[name] = self.get(name, int | several | None, defaults.get(name))
            if isinstance(ids[name], list) and not all(fits(part, int) for part in ids[name]):
                raise ValueError(f"{self.place}: {name} must hold integers, got {ids[name]!r}")
        return {name: value for name, value in ids.items() if value is not None}

    def check_all_known(self) -> None:
        """Refuse an option that the format does not know, unless its value is null."""
        self.expect("is_encoder_decoder", False)
        for name, value in self.values.items():
            if name not in self.known | COMMON and value is not None:
                raise ValueError(f"{self.place}: {name} = {value!r} is not an option of this format that is known")


class Tensors:
    """The tensors of a foreign checkpoint. A format takes each of them once, under its own name and with its shape.

    Every method raises ValueError in one line.
    """

    def __init__(self, folder: Path, *, pickle: bool) -> None:
        self.folder = folder
        self.left = _load_pickle(folder / PICKLE) if pickle and _has_only_a_pickle(folder) else _load(folder)
        for name, tensor in self.left.items():
            if tensor.dtype not in FLOATS:
                raise ValueError(f"{folder}: {name} is {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def __len__(self) -> int:
        return len(self.left)

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor, which must be there and have this shape."""
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise ValueError(f"{self.folder}: {name} is missing, expected {list(shape)}")
        if tensor.shape != shape:
            raise ValueError(f"{self.folder}: {name} is {list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def check_all_taken(self) -> None:
        """Refuse a tensor that the format does not know."""
        for name, tensor in self.left.items():
            raise ValueError(f"{self.folder}: {name} is {list(tensor.shape)}, expected nothing")


def _decoded(value: Any) -> Any:
    """Return a value of JSON with the numbers that transformers writes as objects, such as infinity."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    if isinstance(value, dict):
        return {name: _decoded(part) for name, part in value.items()}
    return [_decoded(part) for part in value] if isinstance(value, list) else value


def _has_only_a_pickle(folder: Path) -> bool:
    return (folder / PICKLE).is_file() and not any(folder.glob("model*.safetensors"))


def _load(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    return tensors


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, which torch reads without running code."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many types
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} is damaged or holds more than tensors, so it is not read: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} holds a {type(tensors).__name__}, expected names and tensors")
    return tensors
