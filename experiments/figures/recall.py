"""Multi-query associative recall: accuracy by the bytes of the decode state, with every seed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import Line, draw
from loglinear.evaluation.mqar.models import CONTROLS

Row = dict[str, Any]  # of `loglinear.evaluation.mqar.gather`

ROUTED = re.compile(r"(.+)_r\d+-f\d+-\w+")  # of `experiments.reads`
VARIANTS = {"mamba2": "Mamba-2", "gated_delta_net": "Gated DeltaNet"}
LINES = {
    "linear": Line("linear, states of one or several sizes", "#0f80c1", "s"),
    "log_linear": Line("log-linear", "#d55e00", "o"),
    "attention": Line("softmax attention", "#8c8c8c", "v"),
    "routed": Line("routed reads", "#009e73", "^"),
}


def draw_recall_by_bytes(file: Path, rows: Sequence[Row], title: str | None = None) -> list[Path]:
    """Draw a panel for each variant and dimension. Points are seeds, vertical lines ranges, horizontal ones medians.

    Models of a family whose states differ in size alone are joined. A dotted line is the size of the KV cache where no
    attention model is drawn. Points of models that did not finish are hollow. Without a title it is `conclusion`.
    """
    return draw(file, lambda theme: _panels(rows, title or conclusion(rows)))


def _panels(rows: Sequence[Row], title: str) -> Figure:
    dims = sorted({row["dim"] for row in rows})
    variants = [name for name in VARIANTS if any(name in row["model"] for row in rows)] or [*VARIANTS][:1]
    figure = Figure(figsize=(7.5, 1.4 + 2.4 * len(variants)))
    grid = figure.subplots(len(variants), len(dims), sharey=True, squeeze=False)
    for name, panels in zip(variants, grid, strict=True):
        for dim, axes in zip(dims, panels, strict=True):
            of_dim = [row for row in rows if row["dim"] == dim]
            families = {"linear": name, "log_linear": f"log_linear_{name}", "routed": f"{name}_routed"}
            if not any(_family(row["model"]) in families.values() for row in of_dim):
                axes.set_axis_off()
                continue
            for family, model in {**families, "attention": "attention"}.items():
                _draw_family(axes, LINES[family], [row for row in of_dim if _family(row["model"]) == model])
            if not any(row["model"] == "attention" for row in of_dim):
                size = of_dim[0]["cache_bytes"] / 1024
                axes.axvline(size, color=LINES["attention"].colour, ls=":", lw=1.2, label="size of the KV cache")
            axes.set_title(f"{VARIANTS[name]}, dimension {dim}", fontsize=10, fontweight="normal")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.6)
            axes.set(ylim=(-4, 104))
        first = next(axes for axes in panels if axes.axison)
        first.set_ylabel("queries answered (%)")
        first.tick_params(labelleft=True)
    first.set_xlabel("decode state of a sequence (KiB, float32)", fontsize=10, loc="left")
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11.5)
    return figure


def _draw_family(axes: Axes, line: Line, rows: Sequence[Row]) -> None:
    """Draw the models of a family in the order of their bytes."""
    rows = sorted(rows, key=lambda row: row["decode_bytes"])
    if not rows:
        return
    sizes = [row["decode_bytes"] / 1024 for row in rows]
    for size, row in zip(sizes, rows, strict=True):
        percent = [100 * accuracy for accuracy in row["accuracies"]]
        axes.plot([size, size], [min(percent), max(percent)], color=line.colour, lw=1.2)
        label = line.label if row is rows[0] else None
        fill = line.colour if row.get("finished", True) else "none"
        axes.plot(
            [size] * len(percent), percent, line.marker, color=line.colour, mfc=fill, ms=5, alpha=0.8, label=label
        )
    medians = [100 * row["median"] for row in rows]
    axes.plot(sizes, medians, "-", color=line.colour, lw=1)
    axes.plot(sizes, medians, "_", color=line.colour, ms=18, mew=2)


def _family(model: str) -> str:
    """Return the model that a control differs from in the size of its state alone; all routed reads are one family."""
    if routed := ROUTED.fullmatch(model):
        return f"{routed[1]}_routed"
    return model[: max(model.rfind("_states"), model.rfind("_equal_bytes"))] if model in CONTROLS else model


def conclusion(rows: Sequence[Row]) -> str:
    """Return a line for each variant: the dimensions at which all seeds of one model are above all of the other.

    The other one is the linear model of equal bytes if it is measured, otherwise that of equal sizes.
    """
    lines = []
    for name, label in VARIANTS.items():
        for other, words in ((f"{name}_equal_bytes", "linear of equal bytes"), (name, "linear")):
            if text := _compared(rows, f"log_linear_{name}", other, words):
                lines.append(f"Log-linear {label}: {text}")
                break
    return "\n".join(lines) or "Queries answered, by the bytes of the decode state"


def _compared(rows: Sequence[Row], name: str, other: str, words: str) -> str:
    """Return the outcomes by dimension; empty if the two models share none."""
    seeds = {(row["model"], row["dim"]): row["accuracies"] for row in rows}
    outcomes: dict[str, list[str]] = {}
    for dim in sorted({row["dim"] for row in rows}):
        if (ours := seeds.get((name, dim))) and (theirs := seeds.get((other, dim))):
            above, below = min(ours) > max(theirs), max(ours) < min(theirs)
            outcome = f"{'above' if above else 'below' if below else 'seeds overlap with'} {words}"
            outcomes.setdefault(outcome, []).append(str(dim))
    return ", ".join(f"{outcome} at {_listed(dims)}" for outcome, dims in outcomes.items())


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
