"""The figures and tables of the documents are those that `python -m experiments.figures` draws of results/."""

import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.figures import main
from tests.documents.pages import DOCS, ROOT

NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
PIXELS = 0.01  # by which another processor's rounding may move a point


def equal(drawn: Path, shown: Path) -> bool:
    """Return True if the files are equal, up to rounding and names of elements."""
    texts = [path.read_text() for path in (drawn, shown)]
    if texts[0] == texts[1] or drawn.suffix != ".svg":
        return texts[0] == texts[1]
    if f"Matplotlib v{matplotlib.__version__}," not in texts[1]:
        return True
    texts = [re.sub(r'\b(id|xlink:href|clip-path)="[^"]*"', "", text) for text in texts]
    words, numbers = (
        [split(text) for text in texts] for split in (re.compile(NUMBER).split, re.compile(NUMBER).findall)
    )
    return words[0] == words[1] and np.allclose(*np.array(numbers, dtype=float), rtol=0, atol=PIXELS)


def refuse_what_does_not_fit(monkeypatch):
    """A legend whose entries are too long for the figure is cut off without a word."""
    save = Figure.savefig

    def checked(figure, path, **options):
        save(figure, path, **options)
        figure.canvas.draw()
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, f"the legend of {path} is too wide"

    monkeypatch.setattr(Figure, "savefig", checked)


def test_figures_are_those_of_the_results(tmp_path, capsys, monkeypatch):
    refuse_what_does_not_fit(monkeypatch)
    main(results=ROOT / "results", out=tmp_path)
    drawn, shown = ({path.name: path for path in folder.iterdir()} for folder in (tmp_path, DOCS / "figures"))
    changed = [name for name in drawn if name not in shown or not equal(drawn[name], shown[name])]
    left = [name for name in shown if name not in drawn]
    assert not changed and not left, f"run `python -m experiments.figures`; changed: {changed}, no longer drawn: {left}"
