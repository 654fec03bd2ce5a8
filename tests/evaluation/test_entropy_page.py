"""The page and the picture of an answer: nothing of the text becomes markup, and all of it can be read."""

import html
import re
import warnings
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from loglinear.evaluation import entropy_plot
from loglinear.evaluation.entropy import SampledAnswer, SampledToken, label, visible_lines
from loglinear.evaluation.entropy_page import DARK, LIGHT, page, write_page
from loglinear.evaluation.entropy_plot import COLUMNS, _cells, plot_entropy

TEXTS = ["<b>", "&amp;", "\"'", "\n", "é", "", "\0", "{x}", "</pre><script>", "\U0001f600", "$a$"]
SETTINGS = {"model": "<runs>&"}


def answer_of(texts, prompt="a <prompt> & more\n", entropies=None):
    values = map(float, entropies or range(len(texts)))
    tokens = (SampledToken(7, text, value, -value) for text, value in zip(texts, values, strict=True))
    return SampledAnswer(prompt, tuple(tokens), 0.2)


class Reader(HTMLParser):
    """The tags of a page, and the text and the attributes of the spans in its answer."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.spans, self.inside = set(), [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "span" and "--h" in dict(attributes).get("style", ""):
            self.inside = (dict(attributes), [])
            self.spans.append(self.inside)

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.inside[1].append(data)


def test_tokens_are_escaped_and_keep_their_text():
    reader = Reader(page(answer_of(TEXTS), SETTINGS))
    assert not reader.tags & {"b", "script", "prompt", "runs"}
    prompt, *spans = reader.spans
    assert "".join(prompt[1]) == "a <prompt> & more\u23ce\n"
    shown = ["".join(parts) for _, parts in spans]
    assert [text.replace("\n", "") for text in shown] == ["".join(visible_lines(text)) for text in TEXTS]
    assert shown[3] == "\u23ce\n" and shown[5] == "\u00b7" and shown[6] == "\u2400"


def test_every_token_has_its_numbers_and_forking_ones_are_underlined_and_listed():
    answer = answer_of(TEXTS)
    text = page(answer, SETTINGS)
    _, *spans = Reader(text).spans
    for index, (attributes, _) in enumerate(spans):
        token = answer.tokens[index]
        assert f"{token.entropy:.4f} nats, {token.bits:.4f} bits" in attributes["title"]
        assert f"probability {token.probability:.4f}" in attributes["title"]
        assert ("fork" in attributes.get("class", "")) == bool(answer.is_forking[index])
        assert attributes["style"] == f"--h:{index / 10:.3f}"
    rows = re.findall(r'<tr><td>(\d+)</td><td class="token">(.*?)</td><td>(.*?)</td>', text)
    assert rows == [
        (str(index + 1), html.escape(label(TEXTS[index])), f"{answer.tokens[index].entropy:.4f}")
        for index in answer.forking()
    ]


def test_the_page_needs_no_other_file_and_is_ascii(tmp_path):
    write_page(tmp_path / "entropy.html", answer_of(TEXTS), SETTINGS)
    text = (tmp_path / "entropy.html").read_bytes().decode("ascii")
    assert not re.search(r"src=|href=|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text and "\U0001f600" in html.unescape(text)


def luminance(colour):
    parts = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return np.dot(parts, (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_text_has_the_contrast_of_wcag_on_every_background(palette):
    for ink, share in [(palette.dim, 0.0), *((palette.ink, share) for share in np.linspace(0, 1, 21))]:
        low, high = sorted((luminance(ink), luminance(palette.background(share))))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_answers_without_entropy_have_no_colour():
    _, *spans = Reader(page(answer_of(["a", "b"], entropies=[0, 0]), SETTINGS)).spans
    assert [attributes["style"] for attributes, _ in spans] == ["--h:0.000"] * 2


def test_lines_of_the_picture_fit_and_have_all_tokens():
    texts = ["word "] * 50 + ["x" * 300, "\n", "\n\n", "\u6f22" * 60, ""]
    answer = answer_of(texts)
    cells = list(_cells(answer))
    assert all(cell.column + cell.width <= COLUMNS for cell in cells)
    ends = {}
    for cell in cells:
        assert cell.column >= ends.get(cell.line, 0)  # no two overlap
        ends[cell.line] = cell.column + cell.width
    for index, text in enumerate(texts):
        drawn = "".join(cell.text for cell in cells if cell.token == index)
        assert drawn == "".join(visible_lines(text)).replace("\u6f22", "\u25af\u25af")
    assert sorted(ends) == list(range(len(ends)))


@pytest.mark.parametrize("texts", [["a"], TEXTS, ["a\n"] * 60], ids=len)
def test_the_picture_is_drawn_without_warnings(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(entropy_plot, "TALLEST", 1000)  # pixels, fewer than 60 lines have
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_entropy(tmp_path / "entropy.png", answer_of(texts, prompt="\u6f22\n" * 3))
    picture = matplotlib.image.imread(tmp_path / "entropy.png")
    assert picture.shape[0] <= 1000 and picture.std() > 0


def test_hot_tokens_have_the_hot_colour(tmp_path):
    plot_entropy(tmp_path / "entropy.png", answer_of(["        "], prompt="", entropies=[1.0]))
    pixels = np.round(matplotlib.image.imread(tmp_path / "entropy.png")[..., :3] * 255).reshape(-1, 3)
    assert (np.abs(pixels - LIGHT.hot).max(1) <= 1).sum() > 1000
