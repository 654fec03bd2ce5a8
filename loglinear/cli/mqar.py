"""`loglinear eval mqar`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from loglinear.cli.console import Interrupted, count
from loglinear.evaluation.mqar import cores, gather, markdown, read_results, run_table
from loglinear.evaluation.mqar.cells import RecallTable, get_task
from loglinear.runs.folder import RUN_FILE, claim
from loglinear.runs.json_files import write_object
from loglinear.training.compilation import require_compiler

TABLE_FILE = "mqar.json"


def run(
    out: Path,
    *,
    processes: int | None,
    minutes: float | None,
    task: dict[str, Any],
    preset: str = "standard",
    compile: bool = False,
    **table: Any,
) -> None:
    """Run the missing cells, write mqar.json and print the table of all cells in the folder.

    `preset` is a name in TASKS, and `task` holds values in place of its own.
    """
    if compile:
        require_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    given = {name: tuple(values) for name, values in table.items() if values}
    cells = RecallTable(**given, task=get_task(preset).override(**task))
    if (out / RUN_FILE).exists():
        raise ValueError(f"--out {out} holds a training run: choose another folder")
    with claim(out):
        progress = run_table(
            cells,
            out,
            processes=min(processes or cores(), len(cells)),
            minutes=minutes,
            compile=compile,
        )
        results = list(read_results(out, cells.task).values())
        if results:
            summary = gather(results, cells.seeds)
            write_object(out / TABLE_FILE, summary)
            print(markdown(summary["table"]))
            print(
                "Test accuracy in percent over seeds. Decode state and KV cache: float32, one sequence, all layers.",
                file=sys.stderr,
            )
    state = f"{progress.finished} of {count(progress.total, 'cell')} finished"
    if progress.finished < progress.total:
        text = f"{state}, checkpoints of the running ones saved; continue with the same command"
        raise Interrupted(text, progress.signal)
    print(state, file=sys.stderr)
