"""Multi-query associative recall: the table of `loglinear eval mqar`, and the numbers of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.figures.tables import MISSING, markdown_table, said
from loglinear.evaluation.mqar import markdown
from loglinear.recipes.mqar_models import ABLATIONS, CHOICES, MODELS
from loglinear.training.files import write_atomically
from loglinear.training.json_files import read_object

PAPER = {  # Guo et al., arXiv 2506.04761, section 4.1: by dimension, in percent, mean (standard deviation)
    "mamba2": ("46.9 (2.3)", "75.1 (4.9)", "89.6 (6.1)"),
    "log_linear_mamba2": ("55.9 (9.1)", "76.5 (4.8)", "92.9 (2.7)"),
    "gated_delta_net": ("38.4 (1.0)", "79.0 (2.1)", "≥ 99"),
    "log_linear_gated_delta_net": ("40.0 (1.4)", "84.4 (1.2)", "≥ 99"),
}
PAPER_DIMS = (16, 32, 64)


def mqar(results: Path, out: Path) -> list[Path]:
    """Write mqar.md: the compared models, the paper's numbers, and ablations of the log-linear models."""
    file = results / "mqar.json"
    if not file.is_file():
        return []
    found = read_object(file)
    parts = ["## Test accuracy", _table(found, MODELS), _note(found)]
    parts += ["## As reported in the paper (arXiv 2506.04761, 5 seeds): not measured here", _paper()]
    measured = {row["model"] for row in found["table"]}
    if not measured.isdisjoint(ABLATIONS):
        parts.append("## Other choices of the log-linear models")
    for model in MODELS:
        choices = [f"{model}_{choice}" for choice in CHOICES]
        if not measured.isdisjoint(choices):
            parts.append(_table(found, [model, *choices]))
    table = out / "mqar.md"
    write_atomically(table, "\n\n".join(parts) + "\n")
    return [table]


def _table(found: dict[str, Any], models: Any) -> str:
    return markdown({"table": [row for row in found["table"] if row["model"] in models]})


def _paper() -> str:
    rows = [[str(dim), *(PAPER[model][index] for model in PAPER)] for index, dim in enumerate(PAPER_DIMS)]
    return markdown_table(["dim", *PAPER], rows).rstrip()


def _note(found: dict[str, Any]) -> str:
    task, made = found["task"], found["made"]
    compared = sorted(len(row["seeds"]) for row in found["table"] if row["model"] in MODELS)
    seeds = said(compared, lambda count: count)
    pairs = ", ".join(map(str, task["pairs"]))
    return (
        f"Percent, mean (standard deviation) over {seeds} seeds, at the learning rate that is best on validation; "
        f"{MISSING}: not measured; *: other learning rates are still to run. Sequences of {task['length']} tokens with "
        f"{pairs} pairs, "
        f"{task['examples']:,} for training with each number of pairs, at most {task['epochs']} epochs. "
        f"{said(made, lambda how: how['precision'])}, {said(made, lambda how: how['versions'].get('device'))}."
    )
