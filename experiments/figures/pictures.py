"""Explanatory pictures, drawn from the code: one token's buckets, the Fenwick array, a block of the model, a state."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from experiments.figures.style import Theme, draw
from loglinear.fenwick import level, merge_height, walk

SHADES = ("#d55e00", "#e69f00", "#009e73", "#0f80c1", "#cc79a7")  # level 0, 1, 2, ...


def pictures(out: Path) -> list[Path]:
    """Draw buckets.svg, fenwick-array.svg, block.svg and state.svg, which need no results."""
    painters = {"buckets": _buckets, "fenwick-array": _fenwick_array, "block": _block, "state": _state}
    return [file for name, paint in painters.items() for file in draw(out / name, paint)]


def _canvas(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.set_title(title)
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, ink: str = "white"):
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=colour, ec="none")
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=9.5)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, lw=1.3, connectionstyle=style)
    )


def _buckets(theme: Theme) -> Figure:
    """Draw the bucket of each past token, for three positions of the query."""
    figure, axes = _canvas(7.5, 3.0, "A token reads one state per bucket; buckets double with distance")
    for row, t in enumerate((13, 14, 16)):
        y = -1.5 * row
        axes.text(-0.4, y + 0.4, f"token {t}", ha="right", va="center")
        starts = [s for s in range(t + 1) if s == 0 or level(t, s) != level(t, s - 1)]
        for start, end in zip(starts, [*starts[1:], t + 1], strict=True):
            l = level(t, start)
            name = f"$\\lambda_{l}$" if end - start < 2 else f"level {l}: $\\lambda_{l}$"
            _box(axes, start + 0.05, y, end - start - 0.1, 0.8, name, SHADES[l % len(SHADES)])
    for s in range(17):
        axes.text(s + 0.5, 1.15, str(s), ha="center", fontsize=9)
    axes.set(xlim=(-2.2, 17.2), ylim=(-3.2, 1.7))
    return figure


def _fenwick_array(theme: Theme) -> Figure:
    """Draw the up-sweep over 16 chunks in place, and the walk of one chunk over its past."""
    N, reader = 16, 13
    figure, axes = _canvas(7.5, 5.0, "One state per chunk: merged in place, then read by every chunk at once")
    for height in range(N.bit_length()):
        size = 2**height
        for end in range(size, N + 1, size):
            kept = merge_height(end) == height  # slot end - 1 keeps this block; others are overwritten
            name = f"slot {end - 1}" if size > 1 else str(end - 1)
            colour, ink = (SHADES[(height + 1) % len(SHADES)], "white") if kept else (theme.faint, theme.ink)
            _box(axes, end - size + 0.06, height, size - 0.12, 0.6, name if kept else "", colour, ink)
            if height:  # the left half is added to the right half in place
                _arrow(axes, (end - size / 2 - 0.3, height - 0.38), (end - 0.5, height - 0.02), theme.ink)
    for end, size in walk(reader):
        _arrow(axes, (reader + 0.5, -0.85), (end - 0.75 * 2**size + 0.1, size - 0.02), "#d55e00", 0.08)
    _box(axes, reader + 0.06, -1.45, 0.88, 0.6, f"{reader}", "#d55e00")
    slots = ", ".join(str(end - 1) for end, _ in walk(reader))
    axes.text(0, -1.15, f"The queries of chunk {reader} read slots {slots}.", va="center", color="#d55e00")
    for height in range(N.bit_length()):
        axes.text(-0.3, height + 0.3, f"round {height}" if height else "chunks", ha="right", va="center", fontsize=9)
    axes.set(xlim=(-2.0, 16.3), ylim=(-1.6, 4.8))
    return figure


def _block(theme: Theme) -> Figure:
    """Draw the way of the hidden states through one block."""
    figure, axes = _canvas(7.5, 3.6, "A log-linear block is a linear block plus level scales")
    grey, ours = "#6e7781", "#d55e00"
    stages = [
        ("norm", 0.00, 1.5, grey),
        ("projection", 1.72, 1.5, grey),
        ("short\nconvolution", 3.44, 1.5, grey),
        ("gates\n(variant)", 5.16, 1.5, grey),
        ("log-linear\noperator", 6.88, 1.5, ours),
        ("gated\nnorm", 8.60, 1.5, grey),
        ("projection", 10.32, 1.5, grey),
    ]
    for text, x, y, colour in stages:
        _box(axes, x, y, 1.4, 0.9, text, colour)
    for (_, x, y, _), (_, following, _, _) in zip(stages, stages[1:], strict=False):
        _arrow(axes, (x + 1.42, y + 0.45), (following - 0.02, y + 0.45), theme.ink)
    _box(axes, 3.9, 0.1, 1.6, 0.8, "level scales", ours)
    _arrow(axes, (0.7, 1.48), (3.88, 0.5), theme.ink, 0.15)
    _arrow(axes, (5.52, 0.5), (7.5, 1.48), theme.ink, 0.15)
    axes.text(5.95, 0.25, "$\\lambda$ [B, T, H, L]", fontsize=10)
    axes.text(2.45, 2.75, "z", fontsize=10)
    _arrow(axes, (2.45, 2.42), (9.3, 2.42), theme.ink, -0.2)
    axes.text(-0.9, 1.95, "x", fontsize=11, va="center")
    _arrow(axes, (-0.7, 1.95), (-0.02, 1.95), theme.ink)
    axes.text(12.15, 1.95, "y", fontsize=11, va="center")
    _arrow(axes, (11.74, 1.95), (12.1, 1.95), theme.ink)
    axes.set(xlim=(-1.0, 12.5), ylim=(-0.1, 3.7))
    return figure


def _state(theme: Theme) -> Figure:
    """Draw the blocks of a FenwickState after 13 full chunks and 40 tokens of the next one."""
    chunks, C, held = 13, 64, 40
    figure, axes = _canvas(7.5, 3.3, f"FenwickState at position {chunks * C + held}: block states and raw tokens")
    for end, size in walk(chunks):
        length = 2**size
        text = f"block {size}\n{length} chunks" if length > 1 else f"{size}"
        _box(axes, end - length + 0.06, 1.0, length - 0.12, 0.9, text, SHADES[(size + 1) % len(SHADES)])
    _box(axes, chunks + 0.06, 1.0, held / C, 0.9, "", "#d55e00")
    axes.text(chunks + 0.06 + held / C + 0.1, 1.45, f"{held} raw tokens:\nk, v, log_decay", va="center", fontsize=10)
    axes.text(0, 2.35, "position // 64 = 13 = 1101 in binary: blocks 3, 2, 0 are in use, block 1 is zero", fontsize=10)
    axes.text(0, 0.35, "blocks [N, M, H, K, V]", fontsize=10)
    axes.text(chunks, 0.35, "k [N, C, G, K], v [N, C, H, V]", fontsize=10, ha="center")
    axes.set(xlim=(-0.3, 17.2), ylim=(0.0, 2.8))
    return figure
