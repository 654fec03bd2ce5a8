"""Time of the operators against length, compared with widely used kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.figures.style import PEERS, Theme, draw
from loglinear.runs.json_files import read_object

WORK = "forward+backward"
SHAPES = {  # figure -> (file in results/, its shape)
    "speed": ("ops-h100.json", "paper"),
    "speed-delta-rule": ("ops-delta-h100.json", "delta rule"),
}


def speed(results: Path, out: Path) -> list[Path]:
    """Draw speed.svg (scalar gate) and speed-delta-rule.svg: milliseconds of forward and backward by length."""
    written = []
    for name, (file, shape) in SHAPES.items():
        if (results / file).is_file():
            result = read_object(results / file)
            curves = _curves([row for row in result["rows"] if row["shape"] == shape])
            device = result["about"]["machine"]["gpu"]
            written += draw(out / name, lambda theme, c=curves, d=device: _figure(c, d, theme))  # type: ignore[misc]
    return written


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Return milliseconds by peer and length."""
    rows = sorted(rows, key=lambda row: row["T"])
    return {
        peer: {row["T"]: row["figures"][peer][WORK] for row in rows if peer in row["figures"]}
        for peer in PEERS
        if any(peer in row["figures"] for row in rows)
    }


def _figure(curves: dict[str, dict[int, float]], device: str, theme: Theme) -> Figure:
    figure = Figure(figsize=(7.5, 4.2))
    axes = figure.subplots()
    for peer, times in curves.items():
        line = PEERS[peer]
        axes.plot(list(times), list(times.values()), line.marker + "-", color=line.colour, label=line.label)
    longest = max(curves["loglinear"])
    axes.set(title=_conclusion(curves, longest), xlabel="sequence length T (tokens)")
    axes.set_ylabel("forward and backward (ms)")
    token_axis(axes, [T for T in curves["loglinear"]])
    axes.set_yscale("log")
    if max(max(times.values()) for times in curves.values()) < 100:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("")
    axes.text(1, 0.02, device, transform=axes.transAxes, ha="right", fontsize=9)
    axes.grid(alpha=0.6)
    axes.legend(frameon=False)
    return figure


def _conclusion(curves: dict[str, dict[int, float]], T: int) -> str:
    ours = curves["loglinear"][T]
    words = []
    for peer, what in (
        ("mamba-ssm SSD (linear)", "of the linear kernel's time"),
        ("fla Gated DeltaNet (linear)", "times the linear kernel's time"),
        ("FlashAttention-2", "of softmax's"),
    ):
        if peer in curves:
            share = ours / curves[peer][T]
            words.append(f"{share:.2f} {what}" if share > 0.1 else f"1/{1 / share:.0f} {what}")
    return f"At {T // 1024}K tokens: " + ", ".join(words)


def token_axis(axes: Axes, lengths: list[int]) -> None:
    """A logarithmic axis of lengths, labelled 2K, 4K, ... 128K; lengths below 1,024 in full."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{T // 1024:,}K" if T >= 1024 else str(T) for T in lengths])
    axes.minorticks_off()
