"""Memorisation: memorised bits against the bits of the dataset, and capacity against parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.capacity import Memory, Series, bits_per_parameter, read_memories, slopes
from experiments.figures.style import MODELS, Line, draw
from experiments.recipes.capacity import PREDICTED, SIZES

LINES = {
    **MODELS,
    "gated_delta_net": Line("Gated DeltaNet", "#009e73", "^"),
    "log_linear_gated_delta_net": Line("log-linear Gated DeltaNet", "#cc79a7", "D"),
}
Memories = Mapping[Series, Sequence[Memory]]  # what was measured of each size and seed
STYLES = {"float32": "--", "bfloat16": "-"}


def capacity(results: Path, out: Path) -> list[Path]:
    """Draw capacity.svg, capacity against parameters, and capacity-KIND-DTYPE.svg, memorised bits by dataset."""
    memories = read_memories(results)
    written = []
    if any(one.capacity is not None for own in memories.values() for one in own):
        written += draw(out / "capacity.svg", lambda theme: _capacities(memories))
    for series, own in memories.items():
        name = f"capacity-{series.kind}-{series.dtype}.svg"
        written += draw(out / name, lambda theme, series=series, own=own: _memorised(series, own))  # type: ignore[misc]
    return written


def conclusion(memories: Memories) -> str:
    """Return the series with their bits a parameter, and the range over seeds if there are several."""
    lines = []
    for series, own in memories.items():
        slope, seeds = slopes(own)
        if slope is not None:
            spread = f" ({min(seeds):.2f} to {max(seeds):.2f}, {len(seeds)} seeds)" if len(seeds) > 1 else " (1 seed)"
            lines.append(f"{label(series)}: {slope:.2f} bits a parameter{spread}")
    return "\n".join(lines) or "Memorised bits, too few sizes for bits a parameter"


def label(series: Series) -> str:
    """Return the words for a series."""
    return f"{LINES[series.kind].label}, {series.dtype}"


def _capacities(memories: Memories) -> Figure:
    figure = Figure(figsize=(7.5, 5))
    axes = figure.subplots()
    for series, own in memories.items():
        points = [(one.parameters, one.capacity) for one in own if one.capacity is not None]
        if not points:
            continue
        line = LINES[series.kind]
        parameters, bits = np.array(sorted(points), dtype=float).T / 1e6
        style = "" if bits_per_parameter(own) is None else STYLES[series.dtype]
        axes.plot(*_means(parameters, bits), style, color=line.colour, label=label(series))
        axes.plot(parameters, bits, line.marker, color=line.colour, alpha=0.8)
    _predicted(axes, f"{PREDICTED} bits a parameter (published, GPT-2)", slope=PREDICTED)
    axes.set_xlabel("parameters (M)", fontsize=10, loc="left")
    axes.set(ylabel="capacity (Mbit)")
    return _finish(figure, axes, conclusion(memories))


def _memorised(series: Series, memories: Sequence[Memory]) -> Figure:
    figure = Figure(figsize=(7.5, 5))
    axes, line = figure.subplots(), LINES[series.kind]
    for shade, size in zip(np.linspace(0.35, 1, len(SIZES)), SIZES, strict=True):
        own = [one for one in memories if one.size == size]
        points = [(one.dataset[load], one.memorised[load]) for one in own for load in one.results]
        if points:
            dataset, bits = np.array(sorted(points), dtype=float).T / 1e6
            style: dict[str, Any] = {"color": line.colour, "alpha": shade}
            parameters = f"{own[0].parameters:,} parameters"
            axes.plot(*_means(dataset, bits), line.marker + "-", label=parameters, **style)
            axes.plot(dataset, bits, line.marker, **style)
    _predicted(axes, "the whole dataset", slope=1)
    axes.set(xscale="log", yscale="log", ylabel="memorised (Mbit)")
    axes.set_xlabel("bits of the dataset (Mbit)", fontsize=10, loc="left")
    return _finish(figure, axes, conclusion({series: memories}))


def _means(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different x, and the mean of the y of each."""
    different, which = np.unique(x, return_inverse=True)
    return different, np.bincount(which, weights=y) / np.bincount(which)


def _predicted(axes: Axes, label: str, *, slope: float) -> None:
    """Draw the dotted line y = slope x over the points that are drawn."""
    ends = np.array(axes.dataLim.intervalx)
    axes.plot(ends, slope * ends, ":", color=matplotlib.rcParams["text.color"], lw=1, label=label)


def _finish(figure: Figure, axes: Axes, title: str) -> Figure:
    axes.grid(alpha=0.6)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure
