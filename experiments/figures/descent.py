"""Double descent: memorised bits, test loss and membership over the bits of the dataset."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from experiments.descent import Descent, read_descents
from experiments.figures.capacity import LINES, STYLES
from experiments.figures.style import draw

ATTACK = "reference"  # the strongest of the four where models of one kind are compared
PANELS = (
    ("memorised (kbit)", lambda one: one.values("memorised_bits") / 1000),
    ("test loss (bits a byte)", lambda one: one.values("test_bits_per_byte")),
    (f"matched F1, attack `{ATTACK}`", lambda one: one.scores(ATTACK)),
)


def descent(results: Path, out: Path) -> list[Path]:
    """Draw descent.svg: three panels over the bits of the dataset divided by the memorised bits at most."""
    descents = read_descents(results)
    return draw(out / "descent.svg", lambda theme: _panels(descents)) if descents else []


def conclusion(descents: list[Descent]) -> str:
    """Return where the test loss of each model is largest, among the loads that were measured."""
    lines = []
    for one in descents:
        ratio = one.ratio[one.values("test_bits_per_byte").argmax()]
        lines.append(f"{label(one)}: test loss is largest where the dataset has {ratio:.1f} times the memorised bits")
    return "\n".join(lines)


def label(one: Descent) -> str:
    """Return the words for a model."""
    return f"{LINES[one.kind].label}, {one.dtype}{f', seed {one.seed}' * (one.seed != 0)}"


def _panels(descents: list[Descent]) -> Figure:
    figure = Figure(figsize=(7.5, 9))
    all_axes = figure.subplots(len(PANELS), 1, sharex=True)
    for axes, (words, values) in zip(all_axes, PANELS, strict=True):
        for one in descents:
            line = LINES[one.kind]
            style = line.marker + STYLES[one.dtype]
            axes.plot(one.ratio, values(one), style, color=line.colour, label=label(one), alpha=0.9)
        axes.axvline(1, ls=":", lw=1, color="gray")
        axes.set(xscale="log", ylabel=words)
        axes.grid(alpha=0.6)
    all_axes[-1].set_xlabel("bits of the dataset over the memorised bits at most", fontsize=10, loc="left")
    handles = all_axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.suptitle(conclusion(descents), x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure
