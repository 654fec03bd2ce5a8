"""metrics.jsonl, the growing record of a run: a line for every step and validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loglinear.runs.checkpoints import step_of
from loglinear.runs.files import write_atomically, writing
from loglinear.runs.manifest import logged_bytes

METRICS_FILE = "metrics.jsonl"


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without a last line that a kill cut short.

    Raises ValueError, which names file and line, if another line is damaged.
    """
    return _records(_read_bytes(out / METRICS_FILE), out / METRICS_FILE)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _records(text: bytes, path: Path) -> list[dict[str, Any]]:
    lines = text.split(b"\n")[:-1]
    return [_record(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"{place} is not a record with a step")
    return record


def append_metrics(out: Path, record: dict[str, Any]) -> None:
    """Append a line to metrics.jsonl. Raises OSError, which names the file, if it cannot be written."""
    with writing(out / METRICS_FILE), (out / METRICS_FILE).open("a") as file:
        file.write(json.dumps(record) + "\n")


def rewind_metrics(out: Path, checkpoint: Path | None) -> list[dict[str, Any]]:
    """Drop the lines of metrics.jsonl after a checkpoint, or all without one. Return the remaining records.

    The checkpoint's manifest has the length of the file at that time. Without it the steps of the records decide.
    """
    path = out / METRICS_FILE
    text = _read_bytes(path)
    size = 0 if checkpoint is None else logged_bytes(checkpoint, METRICS_FILE)
    if size is None:
        assert checkpoint is not None
        steps = [record["step"] for record in _records(text, path)]
        lines = text.splitlines(keepends=True)[: len(steps)]
        kept = b"".join(line for line, step in zip(lines, steps, strict=True) if step <= step_of(checkpoint))
    else:
        kept = text[:size]
    if kept != text:
        write_atomically(path, kept.decode())
    return _records(kept, path)
