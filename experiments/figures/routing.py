"""A needle's question at work: how much each layer of a trained model reads of every bucket, and where the needle is.

python -m experiments.figures.routing --model runs/books --out runs/books/routing.svg
"""

# H heads, n buckets that hold a token
from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.figures.style import Theme, draw
from loglinear.cli import execute
from loglinear.cli.options import COUNT, SEED, SOURCES, Model, option
from loglinear.data.sources import read_documents
from loglinear.data.tokenizer import encode_documents, first_tokens
from loglinear.evaluation.needle import Example, answer_hits, example_sets
from loglinear.inspection import bucket_weights
from loglinear.runs.json_files import write_object
from loglinear.runs.loading import load_checkpoint
from loglinear.runs.provenance import command, versions

NEEDLE, READ = "#0f80c1", "#d55e00"
MOST_LABELS = 24  # buckets whose tokens the axis names

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Reading(NamedTuple):
    """The weights of one token, which predicts the first digits of a needle's value."""

    position: int
    """The token's position; it is the last one that the model has read."""
    buckets: list[range]
    """The tokens of each bucket, oldest first; empty buckets are left out."""
    holds_needle: list[bool]
    """True for each bucket with a token of the needle's sentence."""
    layers: dict[int, np.ndarray]
    """By the layer's number: the weights [H, n]."""
    found: bool
    """True if the model writes the whole answer."""

    def shares(self) -> np.ndarray:
        """Return each bucket's share of a layer's weight, [layers, n], the mean over heads."""
        return np.stack([_shares(weights).mean(0) for weights in self.layers.values()])

    def needle_shares(self) -> list[np.ndarray]:
        """Return for each layer the share [H] of every head's weight on the buckets with the needle."""
        return [_shares(weights)[:, self.holds_needle].sum(1) for weights in self.layers.values()]

    @property
    def even(self) -> float:
        """The share of the buckets with the needle if all weights are equal."""
        return sum(self.holds_needle) / len(self.buckets)


def _shares(weights: np.ndarray) -> np.ndarray:
    """Return the weights [H, n] divided by their sum; 0 for a head that reads nothing."""
    return weights / np.maximum(weights.sum(1, keepdims=True), np.finfo(weights.dtype).tiny)


def reading(model: Any, tokenizer: Any, example: Example) -> Reading:
    """Return the weights of the last token before the digits of an example's first value.

    The model reads the prompt, and of the answer only what comes before these digits: a space, in most tokenizers.
    """
    sentence, start = example.sentences[0], example.prompt.index(example.sentences[0])
    ranges = [(start, start + len(sentence))]
    ((prompt, in_needle),) = encode_documents(tokenizer, [(example.prompt, ranges)])
    ((answer, _),) = encode_documents(tokenizer, [("".join(example.answer), None)])
    prompt, answer = prompt[:-1], answer[len(first_tokens(tokenizer)) : -1]
    has_digit = [any(map(str.isdigit, tokenizer.decode([token]))) for token in answer.tolist()]
    tokens = np.concatenate([prompt, answer[: has_digit.index(True)]]).astype(np.int64)
    layers = bucket_weights(model, torch.from_numpy(tokens)[None].to(model.device))
    position, places = len(tokens) - 1, set(np.flatnonzero(in_needle).tolist())
    held = [(column, bucket) for column, bucket in enumerate(layers[0].buckets(position)) if bucket][::-1]
    columns = [column for column, _ in held]
    return Reading(
        position,
        [bucket for _, bucket in held],
        [not places.isdisjoint(bucket) for _, bucket in held],
        {_number(layer.name): layer.weights[0, -1][:, columns].double().cpu().numpy() for layer in layers},
        bool(answer_hits(model, [(prompt, answer)])[0].all()),
    )


def _number(name: str) -> int:
    """Return the number of a layer from its module's name, such as model.layers.3.mixer."""
    return int(re.findall(r"\.(\d+)(?=\.|$)", f".{name}")[0])


def conclusion(read: Reading) -> str:
    """Return two lines: the layer that reads most of the needle's bucket, and the mean over layers and the outcome."""
    means = [float(share.mean()) for share in read.needle_shares()]
    best, numbers = int(np.argmax(means)), list(read.layers)
    bucket = "the needle's bucket" if sum(read.holds_needle) == 1 else "the needle's buckets"
    even = f"{100 * read.even:.1f} %"
    first = f"No layer gives {bucket} more than an even share of the weight, {even}"
    if round(100 * means[best], 1) > round(100 * read.even, 1):
        first = f"Layer {numbers[best]} gives {bucket} {100 * means[best]:.1f} % of its weight; even is {even}"
    outcome = "the model finds the number" if read.found else "the model does not find the number"
    return f"{first}\nMean over layers: {100 * sum(means) / len(means):.1f} %; {outcome}"


def draw_reading(file: Path, read: Reading) -> list[Path]:
    """Draw a map of layers and buckets, the mean over heads, and the needle's share in each head."""
    return draw(file, lambda theme: _picture(read, theme))


def _picture(read: Reading, theme: Theme) -> Figure:
    figure = Figure(figsize=(7.5, 3.4 + 0.28 * len(read.layers)))
    table, by_head = figure.subplots(1, 2, sharey=True, width_ratios=(3.4, 1))
    shares, rows = 100 * read.shares(), np.arange(len(read.layers)) + 0.5
    colours = LinearSegmentedColormap.from_list("read", [theme.paper, READ])
    image = table.pcolormesh(shares, vmin=0, vmax=max(shares.max(), 1e-3), cmap=colours, ec=theme.faint, lw=0.4)
    _mark_needle(table, read)
    table.set_yticks(rows, [str(number) for number in read.layers])
    table.set_ylabel("layer")
    _name_buckets(table, read)
    for row, heads in zip(rows, read.needle_shares(), strict=True):
        by_head.plot(100 * heads, [row] * len(heads), "o", color=NEEDLE, ms=4, alpha=0.7)
    by_head.axvline(100 * read.even, color=theme.ink, ls=":", lw=1.2)
    by_head.set(xlim=(-3, 103))
    by_head.set_xlabel("needle's share,\neach head (%)\n(dotted: even)", fontsize=9)
    by_head.grid(alpha=0.6)
    label = f"share of a layer's weight (%), mean over heads, read at token {read.position:,}"
    figure.colorbar(image, ax=[table, by_head], location="bottom", shrink=0.6, aspect=40, label=label)
    figure.suptitle(conclusion(read), x=0.01, ha="left", fontweight="bold", fontsize=11.5)
    return figure


def _mark_needle(axes: Axes, read: Reading) -> None:
    height = len(read.layers)
    for column in np.flatnonzero(read.holds_needle).tolist():
        axes.add_patch(Rectangle((column, 0), 1, height, fc="none", ec=NEEDLE, lw=2, clip_on=False, zorder=3))
    middle = float(np.flatnonzero(read.holds_needle).mean()) + 0.5
    axes.text(middle, height + 0.05 * height, "needle", color=NEEDLE, ha="center", va="bottom", fontsize=9.5)


def _name_buckets(axes: Axes, read: Reading) -> None:
    """Name the tokens of the buckets: of all, or of the needle's and evenly spaced others."""
    every = -(-len(read.buckets) // MOST_LABELS)
    named = [
        n
        for n, needle in enumerate(read.holds_needle)
        if needle or n % every == 0 and not any(read.holds_needle[max(0, n - every + 1) : n + every])
    ]
    names = [f"{bucket.start}–{bucket[-1]}" if len(bucket) > 1 else str(bucket.start) for bucket in read.buckets]
    axes.set_xticks([n + 0.5 for n in named], [names[n] for n in named], rotation=90, fontsize=8)
    axes.set_xlabel("bucket: its tokens, oldest first")


@app.command()
def main(
    model: Model,
    out: Annotated[Path, typer.Option(help="The picture, FILE.svg; also writes FILE-dark.svg and FILE.json.")],
    task: Annotated[str, typer.Option(help="One of the needle tasks of `loglinear eval needle`.")] = "single_1",
    length: Annotated[int, typer.Option(help="Length of the example, in tokens.", **COUNT)] = 1024,
    data: Annotated[list[str] | None, option("noise", f"Text of the haystack: {SOURCES}")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the example.", **SEED)] = 0,
) -> None:
    """Draw how much each layer of a log-linear model reads of every bucket, at the question of one needle.

    The token is the last one before the digits of the answer. The weights are those of the routed read, or lambda. The
    picture has the mean over heads, the needle's share in every head, and its even share. FILE.json has all weights.

    Example:

    python -m experiments.figures.routing --model runs/books --out runs/books/routing.svg
    """
    if out.suffix != ".svg":
        raise ValueError(f"--out must end in .svg, got {out}")
    texts = [document.text for document in read_documents(tuple(data or ()))]
    loaded, tokenizer = load_checkpoint(model, device="cuda" if torch.cuda.is_available() else "cpu")
    sets = example_sets(tokenizer, texts, lengths=[length], count=1, tasks=[task], seed=seed)
    example = sets[task, length][0]
    read = reading(loaded, tokenizer, example)
    out.parent.mkdir(parents=True, exist_ok=True)
    numbers = out.with_suffix(".json")
    write_object(
        numbers,
        {
            "model": str(model),
            "task": task,
            "length": length,
            "seed": seed,
            "data": list(data or ()),
            "needle": example.sentences[0],
            "position": read.position,
            "found": read.found,
            "even_share": read.even,
            "buckets": [
                {"tokens": [bucket.start, bucket.stop], "holds_needle": needle}
                for bucket, needle in zip(read.buckets, read.holds_needle, strict=True)
            ],
            "layers": [
                {"layer": number, "needle_share": float(share.mean()), "weights": weights.tolist()}
                for (number, weights), share in zip(read.layers.items(), read.needle_shares(), strict=True)
            ],
            "versions": versions(),
            "command": command(),
        },
    )
    print(conclusion(read))
    print("\n".join(map(str, [*draw_reading(out, read), numbers])))


if __name__ == "__main__":
    execute(app, "python -m experiments.figures.routing")
