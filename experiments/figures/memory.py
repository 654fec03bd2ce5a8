"""Memory against length: of one sequence while decoding, and at the peak of prefill and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.figures.speed import token_axis
from experiments.figures.style import MODELS, Line, draw
from loglinear.runs.json_files import read_object

CURVES = {
    "log-linear Mamba-2": MODELS["log_linear"],
    "linear Mamba-2": MODELS["linear"],
    "log-linear Gated DeltaNet": Line("log-linear Gated DeltaNet", "#e69f00", "D"),
    "linear Gated DeltaNet": Line("linear Gated DeltaNet", "#56b4e9", "^"),
    "Transformer": MODELS["transformer"],
}
Sizes = dict[str, dict[int, float]]  # model -> length -> GiB


def memory(results: Path, out: Path) -> list[Path]:
    """Draw memory.svg, the memory of a decoded sequence, and memory-peaks.svg, the peaks of prefill and training.

    Both are in GiB. The models have 690 to 830 M parameters.
    """
    file = results / "memory-h100.json"
    if not file.is_file():
        return []
    rows = read_object(file)["rows"]
    state = _sizes(rows, "decode", "cache_gib")
    peaks = {work: _sizes(rows, work, "peak_gib") for work in ("prefill", "training")}
    return [
        *draw(out / "memory", lambda theme: _state(state)),
        *draw(out / "memory-peaks", lambda theme: _peaks(peaks)),
    ]


def _sizes(rows: list[dict[str, Any]], work: str, column: str) -> Sizes:
    return {
        model: {row["T"]: row[column] for row in rows if (row["model"], row["work"]) == (model, work) and column in row}
        for model in CURVES
    }


def _state(sizes: Sizes) -> Figure:
    figure = Figure(figsize=(7.5, 4.2))
    axes = figure.subplots()
    _draw(axes, {model: sizes[model] for model in ("log-linear Mamba-2", "linear Mamba-2", "Transformer")})
    T = max(sizes["Transformer"])
    ratio = sizes["Transformer"][T] / sizes["log-linear Mamba-2"][T]
    axes.set_title(f"At {T // 1024}K tokens a log-linear state takes 1/{ratio:.0f} of a KV cache's memory")
    axes.set_ylabel("state of one sequence (GiB)")
    axes.legend(frameon=False)
    return figure


def _peaks(peaks: dict[str, Sizes]) -> Figure:
    figure = Figure(figsize=(7.5, 4.4))
    panels = figure.subplots(1, len(peaks))
    for (work, sizes), axes in zip(peaks.items(), panels, strict=True):
        _draw(axes, sizes)
        axes.tick_params(axis="x", labelsize=9)
        axes.set_title(work, fontweight="normal", fontsize=11)
    panels[0].set_ylabel("GiB at the peak, weights included")
    more = [100 * (_most(sizes) - 1) for sizes in peaks.values()]
    title = f"Log-linear takes at most {more[0]:.0f} % more memory than linear in prefill, {more[1]:.0f} % in training"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _most(sizes: Sizes) -> float:
    """Return the largest ratio of a log-linear model's memory to the linear model's."""
    pairs = [(model, model.replace("log-linear", "linear")) for model in sizes if model.startswith("log-linear")]
    return max(sizes[ours][T] / sizes[linear][T] for ours, linear in pairs for T in sizes[ours])


def _draw(axes: Axes, sizes: Sizes) -> None:
    for model, gib in sizes.items():
        line = CURVES[model]
        axes.plot(list(gib), list(gib.values()), line.marker + "-", color=line.colour, label=line.label)
    axes.set_xlabel("sequence length T (tokens)")
    token_axis(axes, sorted({T for gib in sizes.values() for T in gib}))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.6)
