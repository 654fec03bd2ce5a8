"""JSON objects in files: written in one step, read with errors that name the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, where there is something else in it."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write strict JSON atomically; a number that is not known (NaN) becomes null."""
    write_atomically(path, json.dumps(_without_nan(value), indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a kill, sees the old text or the new one."""
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(text)
    staged.replace(path)
