"""The gain of an upgrade: needles found by length and by the bytes of the decode state, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.retrieval import draw_accuracies
from experiments.figures.speed import token_axis
from experiments.figures.style import Line, draw
from experiments.figures.tables import (
    MISSING,
    conditions,
    cost_table,
    join_distinct,
    markdown_table,
    mean_and_seeds,
)
from experiments.recipes.upgrade import BASE
from experiments.results import Result, read_seeds
from experiments.upgrade import FOUND, KINDS, OWN
from loglinear.runs.files import write_atomically

LINES = {
    BASE: Line("linear, before", "#8c8c8c", "v"),
    "linear": Line("linear, continued", "#0f80c1", "s"),
    "levels_new": Line("levels, new weights trained", "#e69f00", "o"),
    "levels_all": Line("levels, all weights trained", "#d55e00", "D"),
    "routed_new": Line("routed, new weights trained", "#cc79a7", "^"),
    "routed_all": Line("routed, all weights trained", "#009e73", "P"),
}
REFERENCE = "linear"  # the baseline, which is trained for as many steps
Scores = list[dict[str, Any]]  # the length and the accuracy, a mean over the tasks, in the order of lengths
Models = Mapping[str, Sequence[Result]]  # kind -> a result for each seed


def upgrade(results: Path, out: Path) -> list[Path]:
    """Draw upgrade.svg, needles found by length and by bytes of all kinds; write upgrade.md.

    Do the same for upgrade-needle, if there are upgrades of models that found needles before.
    """
    return [file for name in (OWN, FOUND) for file in _experiment(results, out, name)]


def _experiment(results: Path, out: Path, name: str) -> list[Path]:
    models = read_seeds(results, name, KINDS)
    if not models:
        return []
    table = out / f"{name}.md"
    write_atomically(table, _table(models))
    return [table, *draw(out / f"{name}.svg", lambda theme: _panels(models))]


def recall(result: Result) -> Scores:
    """Return the accuracy at each length, as the mean over the tasks."""
    scores = [score for task in result["evaluation"]["tasks"].values() for score in task]
    lengths = sorted({score["length"] for score in scores})
    return [{"length": T, "accuracy": np.mean([s["accuracy"] for s in scores if s["length"] == T])} for T in lengths]


def _panels(models: Models) -> Figure:
    figure = Figure(figsize=(7.5, 4.4))
    by_length, by_bytes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    longest = recall(next(iter(models.values()))[0])[-1]["length"]
    for kind, runs in models.items():
        draw_accuracies(by_length, LINES[kind], [recall(run) for run in runs])
        _draw_bytes(by_bytes, LINES[kind], runs)
    length = max(run["recipe"]["seq_len"] for runs in models.values() for run in runs)
    by_length.axvline(length, color=matplotlib.rcParams["text.color"], ls=":", lw=1)
    token_axis(by_length, [score["length"] for score in recall(next(iter(models.values()))[0])])
    by_length.set_title("all tasks, by length", fontsize=10.5, fontweight="normal")
    by_length.set_xlabel("tokens (dotted: training length)", fontsize=10, loc="left")
    by_length.set(ylabel="values found (%)", ylim=(-4, 104))
    by_bytes.set_title(f"all tasks, at {longest:,} tokens", fontsize=10.5, fontweight="normal")
    by_bytes.set_xscale("log", base=2)
    by_bytes.xaxis.set_major_formatter("{x:g}")
    by_bytes.set_xlabel("decode state of a sequence (MiB)", fontsize=10, loc="left")
    for axes in (by_length, by_bytes):
        axes.grid(alpha=0.6)
    handles, labels = by_length.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.suptitle(conclusion(models), x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def _draw_bytes(axes: Axes, line: Line, runs: Sequence[Result]) -> None:
    """Draw the accuracy at the longest length against the bytes: a point for each seed, and a bar at their mean."""
    size = runs[0]["evaluation"]["state_bytes"] / 2**20
    percent = [100 * recall(run)[-1]["accuracy"] for run in runs]
    axes.plot([size] * len(percent), percent, line.marker, color=line.colour, ms=5, alpha=0.8)
    axes.plot([size], [np.mean(percent)], "_", color=line.colour, ms=18, mew=2)


def conclusion(models: Models) -> str:
    """Return a line for each upgrade that is above or below the linear model continued, and at which lengths.

    It is above at a length if all its seeds find more than all seeds of the other. If none is above anywhere, one line
    says so, and another names the models that find nothing.
    """
    upgrades = {kind: runs for kind, runs in models.items() if kind not in (BASE, REFERENCE)}
    if REFERENCE not in models or not upgrades:
        return "Values found, before and after an upgrade"
    theirs = _by_length(models[REFERENCE])
    lines, leads = [], False
    for kind, runs in upgrades.items():
        found = _by_length(runs)
        shared = [T for T in found if T in theirs]
        outcomes = {
            "above": [T for T in shared if min(found[T]) > max(theirs[T])],
            "below": [T for T in shared if max(found[T]) < min(theirs[T])],
        }
        leads = leads or bool(outcomes["above"])
        for word, at in outcomes.items():
            if at:
                where = "all lengths" if at == shared else f"{', '.join(f'{T:,}' for T in at)} tokens"
                lines.append(f"{LINES[kind].label}: {word} linear at {where}")
    if not leads:
        none = [kind for kind, runs in models.items() if not np.any([*_by_length(runs).values()])]
        nothing = [LINES[kind].label.removesuffix(" trained") for kind in none]
        lines = ["No upgrade finds more needles than linear after as many steps"]
        lines += [f"Nothing found: {'; '.join(nothing)}"] * bool(nothing)
    fewest = min(len(runs) for kind, runs in models.items() if kind != BASE)
    lines[-1 if leads else 0] += f" ({fewest} seed{'s' * (fewest > 1)})"
    return "\n".join(lines)


def _by_length(runs: Sequence[Result]) -> dict[int, list[float]]:
    """Return the accuracies of all seeds by length."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for score in recall(run):
            found.setdefault(score["length"], []).append(score["accuracy"])
    return found


def _table(models: Models) -> str:
    every = [run for runs in models.values() for run in runs]
    lengths = [score["length"] for score in recall(every[0])]
    rows = []
    for kind, runs in models.items():
        accuracies = _by_length(runs)
        bits = [run["evaluation"]["perplexity"]["bits_per_byte"] for run in runs if "perplexity" in run["evaluation"]]
        found = [mean_and_seeds([100 * value for value in accuracies.get(T, [])], 1) for T in lengths]
        rows.append([LINES[kind].label, *found, mean_and_seeds(bits, 4), f"{runs[0]['evaluation']['state_bytes']:,}"])
    header = ["values found, %", *(f"{T:,} tokens" for T in lengths), "bits per byte", "bytes of the decode state"]
    prices = cost_table({LINES[kind].label: runs for kind, runs in models.items()})
    continued = [run for kind, runs in models.items() for run in runs if kind != BASE] or every
    evaluations = [run["evaluation"] for run in every]
    examples = join_distinct(evaluations, lambda evaluation: evaluation["examples"])
    haystack = join_distinct(evaluations, lambda evaluation: ", ".join(evaluation["data"]) or "noise")
    tasks = join_distinct(evaluations, lambda evaluation: ", ".join(evaluation["tasks"]))
    before = join_distinct(models.get(BASE, []), _steps) or MISSING
    note = (
        f"Means over the tasks {tasks} of `loglinear eval needle`, with {examples} examples of each and every length, "
        f"in {haystack}. Numbers are the mean and each seed. The decode state is that of one sequence of "
        f"{lengths[-1]:,} tokens. The linear model before was trained for {before} steps, and "
        f"each other one for {join_distinct(continued, _steps)} steps more. {conditions(continued)}"
    )
    return f"{markdown_table(header, rows)}\n{note}\n\n{prices}"


def _steps(result: Result) -> str:
    return f"{result['training']['steps']:,}"
