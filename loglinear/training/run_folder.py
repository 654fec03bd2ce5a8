"""A run's folder: who is writing to it, which run it holds, and its metrics.jsonl."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import accelerate
import numpy
import torch
import transformers

import loglinear
from loglinear.recipes import TrainingRecipe

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind: there a folder is not guarded
    fcntl = None  # type: ignore[assignment]

RUN_FILE, METRICS_FILE, LOCK_FILE = "run.json", "metrics.jsonl", ".lock"


@contextmanager
def claim(out: Path) -> Iterator[None]:
    """Hold a run's folder for this process; the operating system lets go when the process ends, however it ends.

    Raises ValueError where another live process holds it, or where it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK_FILE).open("a+")
    except OSError as error:
        raise ValueError(f"output folder {out} cannot be written: {error.strerror}") from error
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise ValueError(f"output folder {out} is in use by another process (pid {holder})") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def require_empty(out: Path) -> None:
    """Raise ValueError where the folder already holds something."""
    if (out / RUN_FILE).exists():
        raise ValueError(f"output folder {out} holds another run: add --resume to continue it, or choose another --out")
    if any(path.name != LOCK_FILE for path in out.iterdir()):
        raise ValueError(f"output folder {out} is not empty: choose another --out")


def read_run(out: Path) -> dict[str, Any]:
    """What run.json says. Raises ValueError where the folder holds no run."""
    try:
        return json.loads((out / RUN_FILE).read_text())
    except FileNotFoundError:
        raise ValueError(f"output folder {out} holds no run to resume (no {RUN_FILE})") from None
    except ValueError as error:
        raise ValueError(f"{out / RUN_FILE} is not JSON: {error}") from error


def run_recipe(out: Path) -> TrainingRecipe:
    """The recipe of the run in this folder."""
    return TrainingRecipe.from_dict(read_run(out)["recipe"])


def write_run(out: Path, recipe: TrainingRecipe, data: dict[str, Any], parameters: int) -> None:
    """Record everything that decides the result: recipe with its seed, data, versions, command."""
    write_atomically(
        out / RUN_FILE,
        json.dumps(
            {
                "recipe": recipe.to_dict(),
                "seed": recipe.seed,
                "parameters": parameters,
                "data": data,
                "versions": versions(),
                "command": sys.argv,
                "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
            indent=2,
        )
        + "\n",
    )


def check_same_run(out: Path, recipe: TrainingRecipe, data: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless the folder's run has this recipe and this data."""
    stored = read_run(out)
    old, new = stored["recipe"], recipe.to_dict()
    changed = [name for name in new if old.get(name) != new[name]]
    if changed:
        name = changed[0]
        raise ValueError(f"{out} holds a run with {name} = {old.get(name)!r}, which cannot resume with {new[name]!r}")
    if stored["data"] != data:
        raise ValueError(f"the data of the run in {out} has changed since it started, so it cannot resume exactly")


def versions() -> dict[str, str]:
    """Versions and hardware that a figure depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "loglinear": loglinear.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "device": f"{device}, {torch.get_num_threads()} CPU threads",
    }


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a kill, sees the old text or the new one."""
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(text)
    staged.replace(path)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a kill cut short is left out."""
    try:
        lines = (out / METRICS_FILE).read_text().split("\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[:-1]]


def rewind_metrics(out: Path, step: int) -> list[dict[str, Any]]:
    """Drop what metrics.jsonl says about steps after `step`; returns what is left."""
    kept = [record for record in read_metrics(out) if record["step"] <= step]
    write_atomically(out / METRICS_FILE, "".join(json.dumps(record) + "\n" for record in kept))
    return kept
