"""Retrieval from long text: accuracy by length of all models, by length and depth of each, and a table."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from experiments.figures.retrieval import draw_depths, draw_recall, draw_retrieval, line_of
from experiments.figures.tables import conditions, cost_table, join_distinct, markdown_table, mean_and_seeds, title
from experiments.recipes.comparison import KINDS
from experiments.results import SEED, Result, read_seeds
from loglinear.evaluation.needle import TASKS
from loglinear.runs.files import write_atomically

LEVELS = re.compile(rf"needle-(log_linear-levels(\d+)){SEED}\.json")  # of `experiments.needle run --levels`


def needle(results: Path, out: Path) -> list[Path]:
    """Draw needle.svg with a panel for each task, recall.svg with two of them, and needle-KIND.svg; write needle.md.

    needle-KIND.svg has a map of lengths and depths, the mean over seeds. Another number of levels is a kind of its own.
    """
    others = {match[1]: int(match[2]) for file in results.iterdir() if (match := LEVELS.fullmatch(file.name))}
    runs_by_kind = read_seeds(results, "needle", (*KINDS, *sorted(others, key=lambda name: others[name])))
    if not runs_by_kind:
        return []
    models = {kind: [run["evaluation"]["tasks"] for run in runs] for kind, runs in runs_by_kind.items()}
    length = next(iter(runs_by_kind.values()))[0]["recipe"]["seq_len"]
    table = out / "needle.md"
    write_atomically(table, _table(runs_by_kind))
    written = [table, *draw_retrieval(out / "needle.svg", models, training_length=length)]
    written += draw_recall(out / "recall.svg", models, training_length=length)
    for kind, runs in models.items():
        label = f"{line_of(kind).label}, {len(runs)} {'seeds' if len(runs) > 1 else 'seed'}"
        written += draw_depths(out / f"needle-{kind}.svg", label, runs)
    return written


def _table(runs_by_kind: dict[str, list[Result]]) -> str:
    scores: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for kind, runs in runs_by_kind.items():
        for run in runs:
            for task, results in run["evaluation"]["tasks"].items():
                for score in results:
                    scores[task, kind, score["length"]].append(score)
    lengths = sorted({length for *_, length in scores})
    evaluated = {(task, kind) for task, kind, _ in scores}
    rows = [
        [f"{task}, {title(kind)}", *(_accuracy(scores.get((task, kind, length), [])) for length in lengths)]
        for task in TASKS
        for kind in runs_by_kind
        if (task, kind) in evaluated
    ]
    accuracies = markdown_table(["values found, %", *(f"{length:,} tokens" for length in lengths)], rows)
    all_runs = [run for runs in runs_by_kind.values() for run in runs]
    prices = cost_table({title(kind): runs for kind, runs in runs_by_kind.items()})
    evaluations = [run["evaluation"] for run in all_runs]
    examples = join_distinct(evaluations, lambda evaluation: evaluation["examples"])
    haystack = join_distinct(evaluations, lambda evaluation: ", ".join(evaluation["data"]) or "noise")
    note = (
        f"{examples} examples of every task and length, in {haystack} (single_1: in noise). A model with one seed "
        f"has the standard error over examples, which is 0 and no certainty where none or all are found. Models with "
        f"several seeds have the mean and each seed. {conditions(all_runs)}"
    )
    return f"{accuracies}\n{note}\n\n{prices}"


def _accuracy(seeds: list[dict[str, Any]]) -> str:
    cell = mean_and_seeds([100 * score["accuracy"] for score in seeds], 1)
    return f"{cell} ± {100 * seeds[0]['standard_error']:.1f}" if len(seeds) == 1 else cell
