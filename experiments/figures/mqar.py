"""Multi-query associative recall: the table of `loglinear eval mqar`, and the numbers of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.figures.recall import draw_recall_by_bytes
from experiments.figures.tables import MISSING, device_of, join_distinct, markdown_table
from loglinear.evaluation.mqar import markdown, rows_of
from loglinear.evaluation.mqar.models import ABLATIONS, CONTROLS, MODELS
from loglinear.runs.files import write_atomically
from loglinear.runs.json_files import read_object

PAPER = {  # Guo et al., arXiv 2506.04761, section 4.1: by dimension, in percent, mean (standard deviation)
    "mamba2": ("46.9 (2.3)", "75.1 (4.9)", "89.6 (6.1)"),
    "log_linear_mamba2": ("55.9 (9.1)", "76.5 (4.8)", "92.9 (2.7)"),
    "gated_delta_net": ("38.4 (1.0)", "79.0 (2.1)", "≥ 99"),
    "log_linear_gated_delta_net": ("40.0 (1.4)", "84.4 (1.2)", "≥ 99"),
}
PAPER_DIMS = (16, 32, 64)
TABLES = ("mqar", "mqar-zoology")  # the two protocols of training


def mqar(results: Path, out: Path) -> list[Path]:
    """Draw NAME.svg and write NAME.md of every NAME in TABLES that is measured.

    NAME.md has the compared models and controls, the paper's numbers, and other choices.
    """
    return [path for name in TABLES if (results / f"{name}.json").is_file() for path in _drawn(results, out, name)]


def _drawn(results: Path, out: Path, name: str) -> list[Path]:
    result = read_object(results / f"{name}.json")
    rows = rows_of(result)
    compared = [row for row in rows if row["model"] in MODELS | CONTROLS]
    parts = ["## Test accuracy", markdown(compared), _note(result, compared)]
    parts += ["## As reported in the paper (arXiv 2506.04761, 5 seeds): not measured here", _paper()]
    choices = [row for row in rows if row["model"] in ABLATIONS]
    if choices:
        parts += ["## Other choices of the log-linear models", markdown(choices)]
    table = out / f"{name}.md"
    write_atomically(table, "\n\n".join(parts) + "\n")
    measured = [row for row in compared if row["seeds"]]
    return [table, *draw_recall_by_bytes(out / f"{name}.svg", measured)] if measured else [table]


def _paper() -> str:
    rows = [[str(dim), *(PAPER[model][index] for model in PAPER)] for index, dim in enumerate(PAPER_DIMS)]
    return markdown_table(["dim", *PAPER], rows).rstrip()


def _note(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    task = result["task"]
    precision = join_distinct(result["made"], lambda how: how["precision"])
    device = join_distinct(result["made"], device_of)
    seeds = join_distinct(sorted(len(row["seeds"]) for row in rows if row["seeds"]), str) or "no reported"
    pairs = ", ".join(map(str, task["pairs"]))
    return (
        f"Percent over {seeds} seeds, at the learning rate that is best on validation; {MISSING}: not measured; "
        "*: other learning rates are still to run. Decode state: the float32 bytes of one sequence of "
        f"{task['length']} tokens in all layers, at the chunk size with the smallest state. KV cache: that of softmax "
        f"attention. Sequences of at most {task['length']} tokens with {pairs} pairs, {task['examples']:,} for "
        f"training with each number of pairs, at most {task['epochs']} epochs. "
        f"{precision}, {device}."
    )
