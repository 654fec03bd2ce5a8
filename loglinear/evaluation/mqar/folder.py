"""A folder of cells: `cells/NAME.json` for a finished one, `unfinished/NAME/` with the checkpoint of a stopped one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from loglinear.evaluation.mqar.cells import RecallCell, RecallTask
from loglinear.runs.checkpoints import checkpoints, step_of
from loglinear.runs.json_files import read_object, read_sealed, write_object, write_sealed

Result = dict[str, Any]  # the value of `run_cell`
CELL_FILE = "cell.json"
# The entries of a result that the table needs.
ACCURACIES = ("test_accuracy", "test_accuracy_by_pairs", "validation_accuracy")
COSTS = ("parameters", "epochs", "steps", "seconds")
HOW = ("precision", "versions", "command")
NEEDED = (*ACCURACIES, *COSTS, *HOW)


def begin(out: Path, cell: RecallCell) -> Path:
    """Make and return the folder for the checkpoints of a cell, which may already hold some.

    Raises ValueError if they belong to another task.
    """
    folder = out / "unfinished" / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    require_same_task(out, cell)
    write_object(folder / CELL_FILE, cell.to_dict())
    return folder


def epochs_trained(out: Path, task: RecallTask) -> float:
    """Return the mean number of epochs in the checkpoints of unfinished cells."""
    saved = [found[-1] for folder in (out / "unfinished").glob("*") if (found := checkpoints(folder))]
    return sum(step_of(checkpoint) for checkpoint in saved) / task.steps_per_epoch / max(1, len(saved))


def finish(out: Path, cell: RecallCell, result: Result) -> None:
    """Write the result of a cell with its checksum, then remove its checkpoints."""
    (out / "cells").mkdir(exist_ok=True)
    write_sealed(out / "cells" / f"{cell.name}.json", result)
    shutil.rmtree(out / "unfinished" / cell.name)


def cell_of(result: Result) -> RecallCell:
    """Return the cell of a result."""
    return RecallCell.from_dict(result["cell"])


def read_results(out: Path, task: RecallTask) -> dict[str, Result]:
    """Return the results of all finished cells by name.

    A file without a checksum is read as it is.

    Raises ValueError, which names the file, for a file that is damaged, is no result or belongs to another task.
    """
    results = {}
    for file in sorted((out / "cells").glob("*.json")):
        result = read_sealed(file)
        try:
            cell = cell_of(result)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file} holds no cell: {error}") from error
        if missing := [name for name in NEEDED if name not in result]:
            raise ValueError(f"{file} is no result of a cell: it has no {missing[0]!r}")
        _require(file, cell.task, task)
        results[cell.name] = result
    return results


def require_same_task(out: Path, cell: RecallCell) -> None:
    """Raise ValueError, which names the difference, if the checkpoints of a cell belong to another task."""
    file = out / "unfinished" / cell.name / CELL_FILE
    if not file.exists():
        return
    try:
        held = RecallCell.from_dict(read_object(file)).task
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no cell: {error}") from error
    _require(file, held, cell.task)


def _require(file: Path, held: RecallTask, wanted: RecallTask) -> None:
    for name, value in vars(wanted).items():
        if (other := getattr(held, name)) != value:
            raise ValueError(f"{file} was made with {name} = {other}, got {value}: choose another --out")
