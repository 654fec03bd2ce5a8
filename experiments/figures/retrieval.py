"""Needles found: accuracy by length for all models, and by length and depth for one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.speed import token_axis
from experiments.figures.style import MODELS, Line, Theme, draw, draw_seeds

Tasks = Mapping[str, list[dict[str, Any]]]  # task -> `NeedleScores.to_dict` with their `length`, in its order
Models = Mapping[str, Sequence[Tasks]]  # kind -> a run for each seed

TITLES = {
    "single_1": "one needle in noise",
    "single_2": "one needle in text",
    "multikey_1": "one of four keys, in text",
    "multivalue": "four values of one key",
    "multiquery": "four keys at once",
}
README_TASKS = ("single_2", "multikey_1")


def line_of(kind: str) -> Line:
    """Return the line of a kind. The label of a log-linear model with another number of levels names it."""
    levels = re.fullmatch(r"log_linear-levels(\d+)", kind)
    return Line(f"log-linear Mamba-2, {levels[1]} levels", "#7f4f24", "P") if levels else MODELS[kind]


def draw_retrieval(file: Path, models: Models, *, training_length: int) -> list[Path]:
    """Draw a panel for each task: lines are means over seeds, points are seeds."""
    tasks = [task for task in TITLES if any(task in run for runs in models.values() for run in runs)]
    return draw(file, lambda theme: _panels(models, tasks, training_length))


def draw_recall(file: Path, models: Models, *, training_length: int) -> list[Path]:
    """Draw two panels of `draw_retrieval`: needles in text, and needles among other keys."""
    compared = {kind: runs for kind, runs in models.items() if kind in MODELS}
    tasks = [task for task in README_TASKS if any(task in run for runs in compared.values() for run in runs)]
    return draw(file, lambda theme: _panels(compared, tasks, training_length)) if tasks else []


def _panels(models: Models, tasks: Sequence[str], training_length: int) -> Figure:
    columns = min(3, len(tasks) + (len(tasks) > 2))
    rows = -(-(len(tasks) + 1) // columns) if len(tasks) > 2 else 1
    figure = Figure(figsize=(7.5, 3.9 if rows == 1 else 0.8 + 2.6 * rows))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for task, axes in zip(tasks, panels, strict=False):
        for kind, runs in models.items():
            draw_accuracies(axes, line_of(kind), [run[task] for run in runs if task in run])
        axes.axvline(training_length, color=matplotlib.rcParams["text.color"], ls=":", lw=1)
        axes.set_title(TITLES[task], fontsize=10.5, fontweight="normal")
        lengths = sorted({score["length"] for runs in models.values() for run in runs for score in run.get(task, [])})
        if lengths:
            token_axis(axes, lengths)
        axes.set(ylim=(-4, 104))
        axes.grid(alpha=0.6)
    for axes in panels[len(tasks) :]:
        axes.axis("off")
    for axes in panels[::columns]:
        axes.set_ylabel("values found (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    panels[0].set_xlabel("tokens (dotted: training length)", fontsize=10, loc="left")
    figure.suptitle(_conclusion(models), x=0.01, ha="left", fontweight="bold", fontsize=12)
    return figure


NO_CONCLUSION = "Values found by length"


def _conclusion(models: Models) -> str:
    """Log-linear compared with the linear model, and with a larger linear state, on one needle in text."""
    twin, wider = "linear Mamba-2", "a linear model of four times the state"
    more, fewer = _finds_more(models, "log_linear", "linear"), _finds_more(models, "linear", "log_linear")
    fewest = _finds_more(models, "linear_states4", "log_linear")
    if more:
        text = f"On average log-linear finds more needles in text than {twin}"
        return text + (f"\nand fewer than {wider}" if fewest else "")
    others = [name for name, is_ahead in ((twin, fewer), (wider, fewest)) if is_ahead]
    return (
        "On average log-linear finds fewer needles in text than " + "\nand ".join(others) if others else NO_CONCLUSION
    )


def _finds_more(models: Models, kind: str, other: str, task: str = "single_2") -> bool:
    """Do the means over seeds agree that `kind` finds more, at no length fewer?"""
    ours, theirs = (_means(models.get(one, []), task) for one in (kind, other))
    gains = [ours[length] - theirs[length] for length in ours.keys() & theirs.keys()]
    return bool(gains) and min(gains) >= 0 < max(gains)


def _means(runs: Sequence[Tasks], task: str) -> dict[int, float]:
    """Mean accuracy over runs by length."""
    scores = [score for run in runs for score in run.get(task, [])]
    lengths = sorted({score["length"] for score in scores})
    return {T: float(np.mean([score["accuracy"] for score in scores if score["length"] == T])) for T in lengths}


def draw_accuracies(axes: Axes, line: Line, runs: Sequence[list[dict[str, Any]]]) -> None:
    """Draw the mean over seeds as a line, and each seed as points: lists of scores with a length and an accuracy."""
    if not runs:
        return
    percent_RL = 100 * np.array([[score["accuracy"] for score in run] for run in runs])
    draw_seeds(axes, line, [score["length"] for score in runs[0]], percent_RL)


def draw_depths(file: Path, label: str, runs: Sequence[Tasks]) -> list[Path]:
    """Draw maps of one model, the means over its seeds: accuracy by the text's length and the needle's depth."""
    return draw(file, lambda theme: _maps(label, runs, theme))


def _maps(label: str, runs: Sequence[Tasks], theme: Theme) -> Figure:
    tasks = {task: [run[task] for run in runs if task in run] for run in runs for task in run}
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(7.5, 0.9 + 2.3 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for (task, seeds), axes in zip(tasks.items(), panels, strict=False):
        results = seeds[0]
        depths = sorted({part["depth"] for results in seeds for result in results for part in result["by_depth"]})
        table_RDL = np.full((len(seeds), len(depths), len(results)), np.nan)
        for run, of_lengths in enumerate(seeds):
            for column, result in enumerate(of_lengths):
                for part in result["by_depth"]:
                    table_RDL[run, depths.index(part["depth"]), column] = 100 * part["accuracy"]
        table = table_RDL.mean(0)
        colours = matplotlib.colormaps["viridis"].with_extremes(bad=theme.paper)
        image = axes.pcolormesh(table, vmin=0, vmax=100, cmap=colours)
        axes.invert_yaxis()
        axes.set_title(TITLES.get(task, task), fontsize=10.5, fontweight="normal")
        axes.set_xticks(np.arange(len(results)) + 0.5, [f"{result['length'] / 1024:g}K" for result in results])
        axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{100 * depth:.0f} %" for depth in depths], fontsize=8)
    for axes in panels[len(tasks) :]:
        axes.axis("off")
    figure.colorbar(image, ax=list(panels), label="values found (%)", shrink=0.7)
    figure.suptitle(f"{label}: values found by depth", x=0.01, ha="left", fontweight="bold", fontsize=12.5)
    figure.supxlabel("sequence length (tokens)", fontsize=10)
    figure.supylabel("depth (0 %: start of the sequence)", fontsize=10)
    return figure
