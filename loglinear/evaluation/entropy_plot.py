"""A picture of a sampled answer with each token coloured by its entropy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle
from rich.cells import cell_len

from loglinear.evaluation.entropy import SampledAnswer, visible_lines
from loglinear.evaluation.entropy_page import LIGHT, Colour

FONT, FONT_SIZE = "DejaVu Sans Mono", 10  # matplotlib brings this font; its characters are 0.602 sizes wide
COLUMNS = 88
COLUMN, LINE = 0.602 * FONT_SIZE / 72, 1.7 * FONT_SIZE / 72  # inches
MARGIN, HEADER = 0.2, 0.95  # inches
GAP = 0.07  # columns between a token's end and that of its underline
LONGEST_PROMPT = 1000  # characters of it that are drawn, its last ones
TALLEST = 60_000  # pixels: the renderer's limit is 65,536
DPI = 150
MISSING = "\u25af"  # instead of a character that the font does not have


class Cell(NamedTuple):
    """A piece of a token's text in one line of the picture. The prompt's token is None."""

    line: int
    column: int
    text: str
    token: int | None

    @property
    def width(self) -> int:
        """Its columns."""
        return cell_len(self.text)


def plot_entropy(path: Path, answer: SampledAnswer) -> None:
    """Draw the end of the prompt in grey and the answer behind it, with the forking tokens underlined."""
    cells = list(_cells(answer))
    lines = cells[-1].line + 1
    size = (COLUMNS * COLUMN + 2 * MARGIN, lines * LINE + HEADER + MARGIN)
    figure = Figure(figsize=size, facecolor=_rgb(LIGHT.paper))
    width, height = COLUMNS * COLUMN / size[0], lines * LINE / size[1]
    axes = figure.add_axes((MARGIN / size[0], MARGIN / size[1], width, height))
    axes.set(xlim=(0, COLUMNS), ylim=(lines, 0))
    axes.axis("off")
    colours = LinearSegmentedColormap.from_list("entropy", [_rgb(LIGHT.paper), _rgb(LIGHT.hot)])
    _draw(axes, cells, answer, colours)
    scale = figure.add_axes((0.35, 1 - 0.55 / size[1], 0.3, 0.12 / size[1]))
    highest = max(float(answer.entropies.max()), 1e-9)
    figure.colorbar(ScalarMappable(Normalize(0, highest), colours), cax=scale, orientation="horizontal")
    title = f"Entropy in nats; underlined: {len(answer.forking()):,} forking tokens of {len(answer.tokens):,}"
    figure.text(0.5, 1 - 0.3 / size[1], title, ha="center")
    figure.savefig(path, dpi=min(DPI, TALLEST / size[1]))


def _draw(axes: Axes, cells: list[Cell], answer: SampledAnswer, colours: LinearSegmentedColormap) -> None:
    shares, is_forking = answer.shares, answer.is_forking
    boxes, faces, underlines = [], [], []
    for cell in cells:
        colour = LIGHT.dim
        if cell.token is not None:
            colour = LIGHT.ink
            boxes.append(Rectangle((cell.column, cell.line + 0.05), cell.width, 0.9))
            faces.append(colours(float(shares[cell.token])))
            if is_forking[cell.token]:
                ends = (cell.column + GAP, cell.column + cell.width - GAP)
                underlines.append([(end, cell.line + 0.88) for end in ends])
        drawn = axes.text(cell.column, cell.line + 0.5, cell.text, va="center_baseline", parse_math=False)
        drawn.set(color=_rgb(colour), fontfamily=FONT, fontsize=FONT_SIZE)
    axes.add_collection(PatchCollection(boxes, facecolors=faces, linewidths=0, zorder=0))
    axes.add_collection(LineCollection(underlines, colors=[_rgb(LIGHT.ink)], linewidths=1.2))


def _cells(answer: SampledAnswer) -> Iterator[Cell]:
    """Yield the pieces of the prompt's end and of all tokens, wrapped at COLUMNS and at line ends."""
    texts: list[tuple[int | None, str]] = [(None, answer.prompt[-LONGEST_PROMPT:])] if answer.prompt else []
    texts += [(index, token.text) for index, token in enumerate(answer.tokens)]
    line = column = 0
    for token, text in texts:
        parts = visible_lines(text)
        for number, part in enumerate(parts):
            if token is not None and column and column + cell_len(part) > COLUMNS:
                line, column = line + 1, 0
            for piece in _pieces(part, COLUMNS - column):
                if column and column + cell_len(piece) > COLUMNS:
                    line, column = line + 1, 0
                yield Cell(line, column, piece, token)
                column += cell_len(piece)
            if number < len(parts) - 1:
                line, column = line + 1, 0


def _pieces(text: str, room: int) -> Iterator[str]:
    """Yield a text cut where a line is full; `room` are the columns left in the first line."""
    piece = ""
    for character in _drawable(text):
        if piece and cell_len(piece + character) > room:
            yield piece
            piece, room = "", COLUMNS
        piece += character
    if piece:
        yield piece


def _drawable(text: str) -> str:
    known = _known()
    return "".join(character if ord(character) in known else MISSING * cell_len(character) for character in text)


@cache
def _known() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT)).get_charmap())


def _rgb(colour: Colour) -> tuple[float, float, float]:
    red, green, blue = (part / 255 for part in colour)
    return red, green, blue
