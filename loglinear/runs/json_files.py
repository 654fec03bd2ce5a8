"""JSON objects in files, written in one step. Errors name the file; a sealed object carries a checksum."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from loglinear.runs.files import write_atomically

SEAL = "sha256"  # the entry of a sealed object with the checksum of the others


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ValueError, which names the file, for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write strict JSON atomically. NaN becomes null."""
    write_atomically(path, json.dumps(_without_nan(value), indent=2, allow_nan=False) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the object that `write_sealed` wrote, without its checksum. An object without a checksum is not checked.

    Raises ValueError, which names the file, if it is damaged.
    """
    value = read_object(path)
    seal = value.pop(SEAL, None)
    if seal is not None and seal != _seal(value):
        raise ValueError(f"{path} is damaged: it differs from its checksum (to keep an edit, remove its {SEAL!r})")
    return value


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write an object as `write_object` does, with a checksum in it."""
    value = json.loads(json.dumps(_without_nan(value)))  # as it is read later
    write_object(path, {**value, SEAL: _seal(value)})


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def fits(value: Any, hint: Any) -> bool:
    """Return True if a JSON value has an annotated type. An int is a float too, but a bool is no int."""
    options = [get_origin(option) or option for option in (get_args(hint) if isinstance(hint, UnionType) else (hint,))]
    if isinstance(value, bool):
        return bool in options
    return isinstance(value, (*options, int) if float in options else tuple(options))


def type_name(hint: Any) -> str:
    """Return the name of an annotated type for an error's text."""
    return hint.__name__ if isinstance(hint, type) else str(hint)
