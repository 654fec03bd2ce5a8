"""Long texts: the loss of the same bytes with far text given and withheld, by context and position, and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.figures.speed import token_axis
from experiments.figures.style import MODELS, draw, draw_seeds
from experiments.figures.tables import (
    MIB,
    conditions,
    cost_table,
    costs,
    join_distinct,
    markdown_table,
    mean_and_seeds,
    title,
)
from experiments.recipes.comparison import KINDS
from experiments.results import Result, read_seeds
from loglinear.models import LogLinearConfig
from loglinear.models.size import key_value_cache_bytes
from loglinear.runs.files import write_atomically

Models = Mapping[str, Sequence[Result]]  # kind -> a result for each seed


def contexts(results: Path, out: Path) -> list[Path]:
    """Draw long-text-8k.svg, and the same by position and the course of training, and write long-text-8k.md.

    Raises ValueError if two results have different validation texts or contexts.
    """
    models = read_seeds(results, "long-text-8k", KINDS)
    if not models:
        return []
    evaluations = [run["evaluation"] for runs in models.values() for run in runs]
    if len({(found["fingerprint"], *found["contexts"]) for found in evaluations}) > 1:
        raise ValueError("results of different validation texts cannot be compared: run all models on the same")
    table = out / "long-text-8k.md"
    write_atomically(table, _table(models))
    written = [table, *draw(out / "long-text-8k.svg", lambda theme: _by_context(models))]
    written += draw(out / "long-text-8k-positions.svg", lambda theme: _by_position(models))
    return written + draw(out / "long-text-8k-training.svg", lambda theme: _by_step(models))


def _lengths(models: Models) -> tuple[list[int], int]:
    """Return all contexts, and the one of the training."""
    run = next(iter(models.values()))[0]
    return [int(context) for context in run["evaluation"]["contexts"]], run["recipe"]["seq_len"]


def _bits_RC(runs: Sequence[Result]) -> np.ndarray:
    """Return bits per byte of each run and context."""
    return np.array([[bits["bits_per_byte"] for bits in run["evaluation"]["contexts"].values()] for run in runs])


def _changes(models: Models) -> dict[str, np.ndarray]:
    """Return the loss given the training length minus that given the shortest context, for each seed of each kind."""
    found, trained = _lengths(models)
    return {kind: (_bits_RC(runs)[:, found.index(trained)] - _bits_RC(runs)[:, 0]) for kind, runs in models.items()}


def _by_context(models: Models) -> Figure:
    found, trained = _lengths(models)
    figure = Figure(figsize=(7.5, 4.9))
    levels, changes = figure.subplots(1, 2)
    for kind, runs in models.items():
        bits_RC = _bits_RC(runs)
        draw_seeds(levels, MODELS[kind], found, bits_RC)
        draw_seeds(changes, MODELS[kind], found, bits_RC - bits_RC[:, :1])
    for axes, name in ((levels, "bits per byte"), (changes, f"minus that given {found[0]:,} bytes")):
        axes.axvline(trained, color=matplotlib.rcParams["text.color"], ls=":", lw=1)
        axes.set_title(name, fontsize=10.5, fontweight="normal")
        token_axis(axes, found)
        axes.grid(alpha=0.6)
    inside = [_bits_RC(runs)[:, : found.index(trained) + 1] for runs in models.values()]
    low, high = min(bits.min() for bits in inside), max(bits.max() for bits in inside)
    steps = [bits - bits[:, :1] for bits in inside]
    least, most = min(step.min() for step in steps), max(step.max() for step in steps)
    # A model that fails past its training length leaves the panels: its numbers are in the table.
    levels.set_ylim(low - 0.1 * (high - low), high + 0.25 * (high - low))
    changes.set_ylim(least - 0.2 * (most - least), most + 0.4 * (most - least))
    levels.set_xlabel("bytes given (dotted: training length)", fontsize=10, loc="left")
    handles, labels = levels.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    means = {kind: change_R.mean(keepdims=True) for kind, change_R in _changes(models).items()}
    figure.suptitle(_conclusion(models, means), x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def _conclusion(models: Models, changes: Mapping[str, np.ndarray]) -> str:
    """Return a title: the range of the changes of the model that gains most, and the range of all others."""
    found, trained = _lengths(models)
    first, *others = sorted(changes, key=lambda kind: float(changes[kind].mean()))
    lines = [
        f"Given {trained:,} bytes instead of {found[0]:,}, the loss of the {title(first)} model changes by",
        f"{_range(changes[first])} bits per byte",
    ]
    if others:
        lines[-1] += f", that of the other models by {_range(np.stack([changes[kind] for kind in others]))}"
    return "\n".join(lines)


def _range(values: np.ndarray, form: str = "+.3f") -> str:
    low, high = f"{values.min():{form}}", f"{values.max():{form}}"
    return low if low == high else f"{low} to {high}"


def _by_position(models: Models) -> Figure:
    """Draw a panel for each kind: the targets' loss with all text of the training length, and with the least."""
    found, trained = _lengths(models)
    columns = min(3, len(models))
    figure = Figure(figsize=(7.5, 1.2 + 2.1 * math.ceil(len(models) / columns)))
    panels = figure.subplots(math.ceil(len(models) / columns), columns, squeeze=False, sharey=True).ravel()
    changes = {}
    for (kind, runs), axes in zip(models.items(), panels, strict=False):
        bits_CP = []
        for context, style in ((found[0], "--"), (trained, "-")):
            bits_RP = np.array([run["evaluation"]["contexts"][str(context)]["by_position"] for run in runs])
            bits_CP.append(bits_RP.mean(0))
            position = runs[0]["evaluation"]["position"]
            axes.plot(position, bits_CP[-1], style, color=MODELS[kind].colour, label=f"given {context:,} bytes")
            axes.fill_between(position, bits_RP.min(0), bits_RP.max(0), color=MODELS[kind].colour, alpha=0.2, lw=0)
        changes[kind] = bits_CP[1] - bits_CP[0]
        axes.set_title(title(kind), fontsize=10.5, fontweight="normal")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(labelsize=8)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.6)
    for axes in panels[len(models) :]:
        axes.axis("off")
    figure.supxlabel("position in the window (bytes); bands: range of the seeds", fontsize=10)
    figure.supylabel("bits per byte", fontsize=10)
    figure.suptitle(
        f"{_conclusion(models, changes)},\nat every position", x=0.01, ha="left", fontweight="bold", fontsize=11
    )
    return figure


def _by_step(models: Models) -> Figure:
    """Draw the validation loss of each kind in the course of training."""
    figure = Figure(figsize=(7.5, 4.9))
    axes = figure.subplots()
    falls, steps = [], []
    for kind, runs in models.items():
        records = [[one for one in run["training"]["curve"] if one["split"] == "validation"] for run in runs]
        steps = [one["step"] for one in records[0]]
        bits_RS = np.array([[one["bits_per_byte"] for one in curve] for curve in records])
        draw_seeds(axes, MODELS[kind], steps, bits_RS)
        falls.append(bits_RS[:, -2:].mean(0) @ [1, -1])
    axes.set(xlabel="training step", ylabel="bits per byte of validation")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.6)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.suptitle(
        f"In the last {steps[-1] - steps[-2]:,} of {steps[-1]:,} steps the losses still fall by\n"
        f"{_range(np.array(falls), '.2f')} bits per byte",
        x=0.01,
        ha="left",
        fontweight="bold",
        fontsize=11,
    )
    return figure


def _table(models: Models) -> str:
    found, trained = _lengths(models)
    header = [
        "bits per byte",
        "decode state, MiB",
        "KV cache, MiB",
        *(f"given {context:,} bytes" for context in found),
        f"change from {found[0]:,} to {trained:,}",
        "standard error",
    ]
    rows = []
    for (kind, runs), change_R in zip(models.items(), _changes(models).values(), strict=True):
        bits = [mean_and_seeds(bits_R, 4) for bits_R in _bits_RC(runs).T.tolist()]
        recipe = runs[0]["recipe"]
        cache = key_value_cache_bytes(LogLinearConfig(**recipe["model"]), trained) / MIB
        error = _document_error(runs, found[0], trained)
        rows.append(
            [
                title(kind),
                costs(runs[0])[-1],
                f"{cache:.2f}",
                *bits,
                mean_and_seeds(change_R.tolist(), 4, "+"),
                f"{error:.4f}",
            ]
        )
    every = [run for runs in models.values() for run in runs]
    first = every[0]["evaluation"]
    passes = join_distinct(every, lambda run: f"{run['training']['tokens'] / run['data']['train']['tokens']:.2f}")
    note = (
        f"Numbers are the mean and each seed, of the same {first['targets']:,} bytes of {len(first['documents'])} "
        f"validation documents. Each byte is predicted from at most so many bytes before it, and from at least half of "
        f"them. The standard error of the change is over documents, whose losses are means over seeds. Training reads "
        f"the training text {passes} times. Decode state and KV cache are those of one sequence of {trained:,} tokens, "
        f"the cache that of a Transformer with as many layers. {conditions(every)}"
    )
    prices = cost_table({title(kind): runs for kind, runs in models.items()})
    return f"{markdown_table(header, rows)}\n{note}\n\n{prices}"


def _document_error(runs: Sequence[Result], short: int, long: int) -> float:
    """Return the standard error over documents of the mean change from one context to another."""
    bits = [[run["evaluation"]["contexts"][str(context)]["by_document"] for run in runs] for context in (short, long)]
    change_D = np.diff(np.array(bits, dtype=float).mean(1), axis=0)[0]
    return float(change_D.std(ddof=1) / math.sqrt(len(change_D))) if len(change_D) > 1 else math.nan
