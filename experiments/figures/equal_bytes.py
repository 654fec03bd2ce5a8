"""Multi-query associative recall: routed reads and the published lambda beside linear models of as many bytes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.figures.recall import Row, draw_recall_by_bytes
from loglinear.runs.json_files import read_object

TUNING_SEED = 0  # of the protocol of `experiments.reads.compare`: it chooses the learning rate
RESULT = "reads-equal-bytes-unfinished.json"


def equal_bytes(results: Path, out: Path) -> list[Path]:
    """Draw equal-bytes.svg from the cells of `experiments.reads.compare`, finished or not."""
    file = results / RESULT
    if not file.is_file():
        return []
    rows = rows_of_cells(read_object(file))
    return draw_recall_by_bytes(out / "equal-bytes.svg", rows, title_of(rows))


def rows_of_cells(result: dict[str, Any]) -> list[Row]:
    """Return a row for each model with reported seeds.

    The accuracy is that of the test; of a model with an unfinished cell it is each cell's last on validation.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in result["cells"]:
        if line["cell"]["seed"] != TUNING_SEED and line["validation_accuracy_by_epoch"]:
            groups.setdefault((line["cell"]["model"], line["cell"]["dim"]), []).append(line)
    rows = []
    for (model, dim), lines in groups.items():
        finished = all(line["finished"] for line in lines)
        accuracies = [x["test_accuracy"] if finished else x["validation_accuracy_by_epoch"][-1] for x in lines]
        kib = result["decode_kib"][str(dim)]
        rows.append(
            {
                "model": model,
                "dim": dim,
                "decode_bytes": 1024 * kib[model],
                "cache_bytes": 1024 * kib["KV cache"],
                "accuracies": accuracies,
                "median": statistics.median(accuracies),
                "finished": finished,
            }
        )
    return rows


def title_of(rows: Sequence[Row]) -> str:
    """Return in how many cases a linear model of at most as many bytes has a median at least as high."""
    others = [row for row in rows if not _is_linear(row)]
    behind = [row for row in others if any(_beats(linear, row) for linear in rows if _is_linear(linear))]
    return (
        f"In {len(behind)} of {len(others)} cases a linear model of at most as many bytes\n"
        "answers as many queries as the log-linear one or more (medians)"
    )


def _is_linear(row: Row) -> bool:
    return row["model"].partition("_states")[0] in ("mamba2", "gated_delta_net")


def _beats(linear: Row, row: Row) -> bool:
    same = linear["dim"] == row["dim"] and linear["model"].partition("_states")[0] in row["model"]
    return same and linear["decode_bytes"] <= row["decode_bytes"] and linear["median"] >= row["median"]
