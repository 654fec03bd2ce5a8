"""Retrieval from long text: accuracy by length of all models, by length and depth of each, and a table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from experiments.figures.results import (
    COST_COLUMNS,
    MISSING,
    Result,
    conditions,
    costs,
    markdown_table,
    read_results,
    said,
    title,
)
from loglinear.evaluation.needle import TASKS
from loglinear.evaluation.plots import plot_needle, plot_retrieval
from loglinear.recipes.comparison import KINDS
from loglinear.training.json_files import write_atomically

LEVELS = re.compile(r"needle-(log_linear-levels(\d+))\.json")  # what `experiments.needle run --levels` writes


def needle(results: Path, out: Path) -> None:
    """needle.png with a panel for each task, needle-KIND.png with a map of lengths and depths, and needle.md; other
    numbers of levels are kinds of their own."""
    others = [match for file in results.glob("needle-*.json") if (match := LEVELS.fullmatch(file.name))]
    names = [match[1] for match in sorted(others, key=lambda match: int(match[2]))]
    found = read_results(results, "needle", (*KINDS, *names))
    if not found:
        return
    models = {kind: result["evaluation"]["tasks"] for kind, result in found.items()}
    length = next(iter(found.values()))["recipe"]["seq_len"]
    plot_retrieval(out / "needle.png", models, training_length=length)
    for kind, tasks in models.items():
        plot_needle(out / f"needle-{kind}.png", tasks)
    write_atomically(out / "needle.md", _table(found))


def _table(found: dict[str, Result]) -> str:
    cells = {
        (task, kind, score["length"]): _accuracy(score)
        for kind, result in found.items()
        for task, scores in result["evaluation"]["tasks"].items()
        for score in scores
    }
    lengths = sorted({length for *_, length in cells})
    asked = dict.fromkeys((task, kind) for task in TASKS for kind in found if (task, kind, lengths[0]) in cells)
    rows = [
        [f"{task}, {title(kind)}", *(cells.get((task, kind, length), MISSING) for length in lengths)]
        for task, kind in asked
    ]
    accuracies = markdown_table(["values found, %", *(f"{length:,} tokens" for length in lengths)], rows)
    prices = markdown_table(["model", *COST_COLUMNS], [[title(kind), *costs(result)] for kind, result in found.items()])
    evaluations = [result["evaluation"] for result in found.values()]
    note = (
        f"{said(evaluations, lambda of: of['examples'])} examples of every task and length, in "
        f"{said(evaluations, lambda of: ', '.join(of['data']) or 'noise')} (single_1: in noise), ± the standard error "
        f"over examples. {conditions(found)}"
    )
    return f"{accuracies}\n{note}\n\n{prices}"


def _accuracy(score: dict[str, Any]) -> str:
    return f"{100 * score['accuracy']:.1f} ± {100 * score['standard_error']:.1f}"
