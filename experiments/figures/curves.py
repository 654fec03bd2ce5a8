"""Language modelling: loss by position, its difference from a reference, and the course of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from experiments.figures.speed import token_axis
from experiments.figures.style import MODELS, draw

Curves = Mapping[str, Mapping[str, list[float]]]  # kind -> position, bits_per_byte, standard_error


def draw_positions(file: Path, curves: Curves, *, training_length: int) -> list[Path]:
    """Draw loss against position, with a band of one standard error over documents."""

    def paint(_: Any) -> Figure:
        figure, axes = _axes("Past its training length the Transformer fails; the others do not")
        _draw_bands(axes, curves, training_length)
        token_axis(axes, [2**exponent for exponent in range(4, 17, 2)])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.set(xlabel="position in the document (bytes)", ylabel="bits per byte")
        return figure

    return draw(file, paint)


def draw_differences(file: Path, curves: Curves, *, reference: str, training_length: int) -> list[Path]:
    """Loss minus the reference's against position: below zero is better. The axis is linear up to 0.1 bits per byte."""

    def paint(_: Any) -> Figure:
        name = MODELS[reference].label
        gain = -np.mean(curves["log_linear"]["bits_per_byte"]) if "log_linear" in curves else float("nan")
        figure, axes = _axes(f"Log-linear gains {gain:.3f} bits per byte, and no more at far positions")
        _draw_bands(axes, curves, training_length)
        axes.set_yscale("symlog", linthresh=0.1)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=0.1, subs=[0.2, 0.5, 1]))
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set(xlabel="position in the document (bytes)", ylabel=f"bits per byte minus {name}")
        return figure

    return draw(file, paint)


def draw_training(file: Path, metrics: Mapping[str, list[dict[str, Any]]]) -> list[Path]:
    """Draw validation loss (points) and training loss (thin, smoothed over 5 % of the run) against steps."""

    def paint(_: Any) -> Figure:
        figure, axes = _axes("Models with attention pull ahead in the course of training")
        shown: list[float] = []
        for kind, records in metrics.items():
            line = MODELS[kind]
            train = [record for record in records if record["split"] == "train"]
            validation = [record for record in records if record["split"] == "validation"]
            width = max(1, len(train) // 20)
            bits = np.convolve([record["bits_per_byte"] for record in train], np.ones(width) / width, mode="valid")
            axes.plot([record["step"] for record in train][width - 1 :], bits, color=line.colour, lw=0.8, alpha=0.6)
            steps = [record["step"] for record in validation]
            losses = [record["bits_per_byte"] for record in validation]
            axes.plot(steps, losses, line.marker + "-", color=line.colour, label=line.label, ms=5)
            shown += [*bits[len(bits) // 10 :], *losses]
        if shown:  # the first steps of a random model would hide everything else
            axes.set_ylim(min(shown) - 0.1, max(shown) + 0.1)
        axes.set(xlabel="training step", ylabel="bits per byte")
        axes.legend(frameon=False)
        return figure

    return draw(file, paint)


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 4.2))
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.6)
    return figure, axes


def _draw_bands(axes: Axes, curves: Curves, training_length: int) -> None:
    for kind, curve in curves.items():
        line = MODELS[kind]
        bits, errors = np.array(curve["bits_per_byte"], float), np.array(curve["standard_error"], float)
        axes.plot(curve["position"], bits, line.marker + "-", color=line.colour, label=line.label, ms=3.5, lw=1.5)
        axes.fill_between(curve["position"], bits - errors, bits + errors, color=line.colour, alpha=0.2, lw=0)
    axes.axvline(training_length, color="#8c8c8c", ls=":", label="training length")
    axes.legend(frameon=False)
