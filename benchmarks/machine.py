"""What every result carries: the command, the machine and the versions."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

import loglinear
from loglinear.cli import execute

LARGEST = 2**31 - 1


def command_line(main: Callable[..., None], name: str) -> None:
    """The command line of a benchmark: a mistake is one line and exit code 2, as with `loglinear`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    execute(app, f"python -m benchmarks.{name}")


def check_options(device: str, out: Path | None, **counts: int | list[int] | None) -> None:
    """One line for options that could not work, before anything is measured: counts are at least 1."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda needs a CUDA GPU, and this machine has none")
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"--out {out}: there is no folder {out.parent}")
    if out is not None and out.is_dir():
        raise typer.BadParameter(f"--out must be a file, got the folder {out}")
    for name, given in counts.items():
        for value in given if isinstance(given, list) else [1 if given is None else given]:
            if not 1 <= value <= LARGEST:
                raise typer.BadParameter(f"--{name} must lie between 1 and {LARGEST}, got {value}")


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
