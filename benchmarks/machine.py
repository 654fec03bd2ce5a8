"""The parts that all benchmarks share: options, progress, results with their command, machine and versions."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import loglinear
from loglinear.cli import execute
from loglinear.runs.json_files import write_object

LARGEST = 2**31 - 1


def command_line(main: Callable[..., None], name: str) -> None:
    """Run the command line of a benchmark. A mistake ends with one line and exit code 2, as with `loglinear`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    execute(app, f"python -m benchmarks.{name}")


def check_options(device: str, out: Path | None, **counts: int | list[int] | None) -> None:
    """Raise BadParameter, before anything is measured, for options that cannot work. Counts are at least 1."""
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


def progress_bar() -> Progress:
    """Return a progress bar on standard error with the time so far."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def announce(progress: Progress, task: TaskID, text: str) -> None:
    """Show the current measurement: on the bar, or in a line of its own where there is no terminal."""
    progress.update(task, description=text)
    if not progress.console.is_terminal:
        print(text, file=sys.stderr, flush=True)


def keep(out: Path | None, described: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the rows so far atomically, so that an interrupted run loses nothing."""
    if out is not None:
        write_object(out, {"about": described, "rows": rows})


def about(script: str, device: str) -> dict[str, Any]:
    """Return the command, the machine and the versions of a result."""
    versions = {"loglinear": loglinear.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    machine: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    if device == "cuda":
        import triton

        versions["triton"] = triton.__version__
        machine = {"gpu": torch.cuda.get_device_name()}
    command = " ".join(["python -m", f"benchmarks.{script}", *sys.argv[1:]])
    return {"command": command, "machine": machine, "versions": versions}
