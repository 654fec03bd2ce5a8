"""Reinforcement learning: held-out accuracy, entropy and length of answers over rounds, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import MODELS, Line, draw
from experiments.figures.tables import markdown_table, title
from experiments.recipes.rl import ALL, KINDS, LOWEST, TOP
from experiments.results import Result
from experiments.rl import NAMES, read_runs, scores, seeds_of
from loglinear.runs.files import write_atomically

LINES = {
    TOP: Line(NAMES[TOP], "#d55e00", "o"),
    ALL: Line(NAMES[ALL], "#0f80c1", "s"),
    LOWEST: Line(NAMES[LOWEST], "#8c8c8c", "v"),
}
Runs = Mapping[str, Sequence[Result]]  # tokens that learn -> a result for each seed
PANELS = {  # title -> the curve of a result, its field, and a factor
    "held-out problems solved (%)": ("evaluation", "accuracy", 100),
    "entropy of a token (nats)": ("training", "entropy", 1),
    "tokens of an answer": ("training", "length", 1),
}
TESTED = {  # column -> the field of a test, and a factor
    "sampled": ("accuracy", 100),
    "likeliest": ("greedy", 100),
    "any sample": ("any", 100),
    "ended": ("ended", 100),
    "length": ("length", 1),
}
AVERAGED = 10  # rounds whose entropy is averaged at each end


def rl(results: Path, out: Path) -> list[Path]:
    """Draw rl-KIND.svg, the course of the rounds of each kind, and write rl.md, the scores by choice and by seed."""
    runs = read_runs(results)
    if not runs:
        return []
    columns, rows = scores(runs)
    tables = [markdown_table(columns, rows), seed_table(runs)]
    write_atomically(out / "rl.md", "\n".join(tables))
    written = [out / "rl.md"]
    for kind in KINDS:
        own = {tokens: seeds for (of, tokens), seeds in runs.items() if of == kind}
        if own:
            written += draw(out / f"rl-{kind}.svg", lambda theme, kind=kind, own=own: _course(kind, own))  # type: ignore[misc]
    return written


def seed_table(runs: Mapping[tuple[str, str], Sequence[Result]]) -> str:
    """Return a table of every run: percents solved, lengths and ends in the tests, and entropies of the rounds."""
    columns = [f"{name}, {when}" for name in TESTED for when in ("before", "after")]
    columns += [f"entropy, {when} {AVERAGED} rounds" for when in ("first", "last")]
    rows = []
    for (kind, tokens), seeds in runs.items():
        for run in seeds:
            curve, entropies = run["evaluation"]["curve"], [point["entropy"] for point in run["training"]["curve"]]
            cells = [
                f"{factor * curve[place][field]:.1f}" for field, factor in TESTED.values() for place in (0, -1)
            ] + [f"{np.mean(part):.3f}" for part in (entropies[:AVERAGED], entropies[-AVERAGED:])]
            minutes = f"{run['training']['minutes']:.1f}"
            rows.append([title(kind), NAMES[tokens], f"{run['seed']}", *cells, minutes])
    return markdown_table(["kind", "tokens", "seed", *columns, "minutes"], rows)


def conclusion(kind: str, runs: Runs) -> str:
    """Return the kind, and the accuracy before and after for each choice of tokens, with the seeds."""
    parts = []
    for tokens, seeds in runs.items():
        before, after = (
            100 * np.mean([one["evaluation"]["curve"][place]["accuracy"] for one in seeds]) for place in (0, -1)
        )
        own = f"seed{'s' * (len(seeds) > 1)} {seeds_of(seeds)}"
        parts.append(
            f"{LINES[tokens].label}{' of the' * (tokens != ALL)} tokens: {before:.1f} % to {after:.1f} % ({own})"
        )
    if len({seeds_of(seeds) for seeds in runs.values()}) > 1:  # a base model differs from another by more than choices
        parts.append("Their seeds differ, so this figure does not compare them.")
    return "\n".join([f"{MODELS[kind].label}: held-out problems solved, before and after the rounds", *parts])


def _course(kind: str, runs: Runs) -> Figure:
    figure = Figure(figsize=(10, 4.6))
    panels = figure.subplots(1, len(PANELS))
    for axes, (name, (part, field, factor)) in zip(panels, PANELS.items(), strict=True):
        for tokens, seeds in runs.items():
            curves = [[(point["round"], factor * point[field]) for point in one[part]["curve"]] for one in seeds]
            _draw_seeds(axes, LINES[tokens], np.array(curves, dtype=float), marked=part == "evaluation")
        axes.set_title(name, fontsize=10.5, fontweight="normal")
        axes.set_xlabel("rounds", fontsize=10, loc="left")
        axes.grid(alpha=0.6)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=10
    )
    figure.suptitle(conclusion(kind, runs), x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def _draw_seeds(axes: Axes, line: Line, curves_SP2: np.ndarray, *, marked: bool) -> None:
    """Draw the mean over seeds, and each of several seeds thinly."""
    marker = line.marker if marked else ""
    rounds_P, mean_P = curves_SP2.mean(0).T
    axes.plot(rounds_P, mean_P, marker + "-", color=line.colour, label=line.label, ms=4)
    for seed_P2 in curves_SP2 if len(curves_SP2) > 1 else ():
        axes.plot(*seed_P2.T, color=line.colour, lw=0.8, alpha=0.5)
