"""What every result carries: the command, the machine and the versions."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import typer

import loglinear


def check_options(device: str, out: Path | None, **at_least_one: int) -> None:
    """One line for options that could not work, before anything is measured."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda needs a CUDA GPU, and this machine has none")
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"--out {out}: there is no folder {out.parent}")
    for name, value in at_least_one.items():
        if value < 1:
            raise typer.BadParameter(f"--{name} must be at least 1, got {value}")


def keep(out: Path | None, described: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes what has been measured so far, atomically: a run that is cut off loses nothing."""
    if out is not None:
        temporary = out.with_suffix(".tmp")
        temporary.write_text(json.dumps({"about": described, "rows": rows}, indent=1) + "\n")
        temporary.replace(out)


def about(script: str, device: str) -> dict[str, Any]:
    versions = {"loglinear": loglinear.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    machine: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    if device == "cuda":
        import triton

        versions["triton"] = triton.__version__
        machine = {"gpu": torch.cuda.get_device_name()}
    command = " ".join(["python -m", f"benchmarks.{script}", *sys.argv[1:]])
    return {"command": command, "machine": machine, "versions": versions}
