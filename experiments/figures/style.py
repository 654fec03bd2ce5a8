"""The look of every figure: one colour and one name for each model, a light and a dark file of each drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """The colours of a page: ink for text and axes, paper behind them, and a faint line for grids."""

    suffix: str  # of the file's name
    ink: str
    paper: str
    faint: str


THEMES = (Theme("", "#1f2328", "#ffffff", "#d8dee4"), Theme("-dark", "#e6edf3", "#0d1117", "#3d444d"))


@dataclass(frozen=True)
class Line:
    """The look of one model in every figure. The colours are Okabe and Ito's, which colour-blind readers tell apart."""

    label: str
    colour: str
    marker: str = "o"


MODELS = {
    "log_linear": Line("log-linear Mamba-2", "#d55e00", "o"),
    "log_linear_states4": Line("log-linear Mamba-2, four times the state", "#f4a582", "p"),
    "jittered": Line("log-linear Mamba-2, random starts", "#b2182b", "d"),
    "capped": Line("log-linear Mamba-2, two levels fewer", "#cc79a7", "D"),
    "linear": Line("linear Mamba-2", "#0f80c1", "s"),
    "linear_states4": Line("linear Mamba-2, four times the state", "#56b4e9", "X"),
    "routed": Line("routed Mamba-2", "#e69f00", "P"),
    "hybrid": Line("hybrid (some softmax layers)", "#009e73", "^"),
    "transformer": Line("Transformer", "#8c8c8c", "v"),
}
# Peers of the operators, by their names in results/ops-*.json.
PEERS = {
    "loglinear": Line("loglinear (log-linear)", "#d55e00", "o"),
    "mamba-ssm SSD (linear)": Line("mamba-ssm (linear)", "#0f80c1", "s"),
    "fla log-linear": Line("flash-linear-attention (log-linear)", "#e69f00", "D"),
    "FlashAttention-2": Line("FlashAttention-2 (softmax)", "#8c8c8c", "v"),
    "fla Gated DeltaNet (linear)": Line("flash-linear-attention (linear)", "#0f80c1", "s"),
}


def draw(file: Path, paint: Callable[[Theme], Figure]) -> list[Path]:
    """Write FILE.svg and FILE-dark.svg, byte for byte the same each time. Return their paths."""
    written = []
    for theme in THEMES:
        with matplotlib.rc_context(_settings(theme)):
            path = file.with_name(f"{file.stem}{theme.suffix}.svg")
            paint(theme).savefig(path, metadata={"Date": None})
        written.append(path)
    return written


def draw_seeds(axes: Axes, line: Line, places: Sequence[float], values_RX: np.ndarray) -> None:
    """Draw the mean over runs as a line, and each run as points."""
    seeds = f"{len(values_RX)} seeds" if len(values_RX) > 1 else "1 seed"
    axes.plot(places, values_RX.mean(0), color=line.colour, label=f"{line.label}, {seeds}", lw=1.8)
    for values_X in values_RX:
        axes.plot(places, values_X, line.marker, color=line.colour, ms=4.5, alpha=0.8)


def _settings(theme: Theme) -> Any:
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(names, theme.ink),
        **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor", "legend.facecolor"), theme.paper),
        "grid.color": theme.faint,
        "legend.edgecolor": theme.faint,
        "font.size": 11,
        "axes.titlesize": 12.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 2,
        "lines.markersize": 6,
        "svg.hashsalt": "loglinear",
        "figure.constrained_layout.use": True,
    }
