"""Figures of a run: loss by step and by position, needles by length and depth, membership."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from loglinear.evaluation.roc import RocCurve


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def plot_losses(
    path: Path, metrics: Mapping[str, list[dict[str, Any]]], final: Mapping[str, float] | None = None
) -> None:
    """Draw training loss (thin, smoothed over 5 % of the run) and validation loss (dots) of each named model.

    Validation during training reads a part of the validation text. `final` (stars) holds bits per byte of all of it.
    """
    figure, axes = _axes("Training and validation loss", "step", "bits per byte")
    shown: list[float] = []
    for index, (name, records) in enumerate(metrics.items()):
        train = [record for record in records if record["split"] == "train"]
        validation = [record for record in records if record["split"] == "validation"]
        width = max(1, len(train) // 20)
        bits = np.convolve([record["bits_per_byte"] for record in train], np.ones(width) / width, mode="valid")
        axes.plot([record["step"] for record in train][width - 1 :], bits, f"C{index}", lw=1, label=f"{name}, train")
        axes.plot(
            [record["step"] for record in validation],
            [record["bits_per_byte"] for record in validation],
            f"C{index}o--",
            label=f"{name}, validation",
        )
        shown += [*bits[len(bits) // 10 :], *(record["bits_per_byte"] for record in validation)]
        if final and name in final and train:
            axes.plot(train[-1]["step"], final[name], f"C{index}*", ms=12, label=f"{name}, all validation text")
            shown.append(final[name])
    if shown:  # the first steps of a random model would hide everything else
        axes.set_ylim(min(shown) - 0.1, max(shown) + 0.1)
    axes.legend()
    figure.savefig(path, dpi=150)


Curves = Mapping[str, Mapping[str, list[float]]]  # name -> `Perplexity.by_position`


def plot_positions(path: Path, curves: Curves, *, training_length: int | None = None) -> None:
    """Draw loss against position with a band of one standard error for each named curve of `Perplexity.by_position`."""
    figure, axes = _axes("Validation loss by position", "position (tokens)", "bits per byte")
    _draw_curves(axes, curves, training_length)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Axes, curves: Curves, training_length: int | None) -> None:
    for index, (name, curve) in enumerate(curves.items()):
        bits, errors = np.array(curve["bits_per_byte"], float), np.array(curve["standard_error"], float)
        axes.plot(curve["position"], bits, f"C{index}.-", label=name)
        axes.fill_between(curve["position"], bits - errors, bits + errors, color=f"C{index}", alpha=0.15, lw=0)
    if training_length is not None:
        axes.axvline(training_length, color="grey", ls=":", label="training length")
    axes.legend()


Tasks = Mapping[str, list[dict[str, Any]]]  # name -> `NeedleScores.to_dict` with their `length`, in its order


def plot_needle(path: Path, tasks: Tasks) -> None:
    """Draw accuracy against length for all tasks, and a map of length and depth for each task."""
    figure = Figure(figsize=(6 + 3 * len(tasks), 4.5), layout="constrained")
    lines, *maps = figure.subplots(1, 1 + len(tasks), width_ratios=[2] + [1] * len(tasks))
    for (task, results), axes in zip(tasks.items(), maps, strict=True):
        image = _draw_depths(axes, results)
        axes.set(title=task, xlabel="length (tokens)", ylabel="depth")
    _draw_accuracies(lines, tasks)
    figure.colorbar(image, ax=maps, label="accuracy")
    figure.savefig(path, dpi=150)


def _draw_accuracies(axes: Axes, tasks: Tasks) -> None:
    """Draw accuracy against length for each task, with its standard error over examples."""
    for task, results in tasks.items():
        lengths, accuracies, errors = (
            [result[name] for result in results] for name in ("length", "accuracy", "standard_error")
        )
        axes.errorbar(lengths, accuracies, errors, fmt=".-", capsize=3, label=task)
    axes.set(title="Values found", xlabel="length (tokens)", ylabel="accuracy", ylim=(-0.03, 1.03))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_depths(axes: Axes, results: list[dict[str, Any]]) -> AxesImage:
    """Draw accuracy as a colour, one column for each length. Cells without needles stay white."""
    depths = sorted({part["depth"] for result in results for part in result["by_depth"]})
    table = np.full((len(depths), len(results)), np.nan)
    for column, result in enumerate(results):
        for part in result["by_depth"]:
            table[depths.index(part["depth"]), column] = part["accuracy"]
    axes.set_xticks(range(len(results)), [str(result["length"]) for result in results], rotation=90)
    axes.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
    return axes.imshow(table, vmin=0, vmax=1, aspect="auto", cmap="viridis")


def plot_membership(path: Path, curves: Mapping[str, RocCurve]) -> None:
    """Draw the curve of each named score, and the diagonal of a score that knows nothing."""
    figure, axes = _axes("Members told from others", "false positive rate", "true positive rate")
    for index, (name, curve) in enumerate(curves.items()):
        false, true = ([0.0, *rate_S] for rate_S in (curve.false_positive_rate_S, curve.true_positive_rate_S))
        axes.plot(false, true, f"C{index}", label=f"{name}, AUC {curve.auc:.3f}")
    axes.plot([0, 1], [0, 1], color="grey", ls=":", label="chance, AUC 0.5")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
