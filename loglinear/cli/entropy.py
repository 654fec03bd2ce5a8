"""`loglinear eval entropy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.style import Style
from rich.text import Text
from transformers.utils import logging

from loglinear.cli import console
from loglinear.cli.generate import prompt_text
from loglinear.evaluation.entropy import SampledAnswer, label, sample_with_entropy, visible_lines
from loglinear.evaluation.entropy_page import LIGHT, write_page
from loglinear.evaluation.entropy_plot import plot_entropy
from loglinear.evaluation.sampling import check_sampling
from loglinear.runs.folder import require_folder
from loglinear.runs.json_files import write_object
from loglinear.runs.loading import load_checkpoint
from loglinear.runs.provenance import command, versions

LISTED = 20  # forking tokens in the terminal's table; the page and the file have all


def run(path: Path, prompt: str | None, out: Path | None, *, quantile: float, **sampling: Any) -> None:
    """Sample and print an answer; with `out` write entropy.json, .html and .png. `sampling` is as in `sample`."""
    check_sampling(top_k=0, top_p=1.0, **sampling)
    if out is not None:
        require_folder(out, "--out")
    logging.set_verbosity_error()
    model, tokenizer = load_checkpoint(path, device="cuda" if torch.cuda.is_available() else "cpu")
    answer = sample_with_entropy(model, tokenizer, prompt_text(prompt), quantile=quantile, **sampling)
    _print(answer, str(path))
    if out is not None:
        settings, origin = {"model": str(path), **sampling, "quantile": quantile}, versions()
        summary = {"settings": settings, **answer.to_dict(), "versions": origin, "command": command()}
        out.mkdir(parents=True, exist_ok=True)
        write_object(out / "entropy.json", summary)
        write_page(out / "entropy.html", answer, {**settings, **origin})
        plot_entropy(out / "entropy.png", answer)
        print(f"Page, figure and results: {out}")


def _print(answer: SampledAnswer, title: str) -> None:
    """Print the answer in colours, then its forking tokens, which are all that a reader without colours needs."""
    console.print_text(_coloured(answer))
    forking = answer.forking()
    rows = [
        [label(token.text), str(index + 1), f"{token.entropy:.4f}", f"{token.bits:.4f}", f"{token.probability:.4f}"]
        for index, token in ((index, answer.tokens[index]) for index in forking[:LISTED])
    ]
    listed = "" if len(forking) <= LISTED else f", the first {LISTED} by entropy"
    title = (
        f"{title}: {console.count(len(answer.tokens), 'token')}, {answer.entropies.mean():.3f} nats on average, "
        f"{console.count(len(forking), 'forking token')} from {answer.threshold:.3f} nats on{listed}"
    )
    console.print_table(title, ["token", "position", "nats", "bits", "probability"], rows)


def _coloured(answer: SampledAnswer) -> Text:
    text = Text()
    text.append("\n".join(visible_lines(answer.prompt)) if answer.prompt else "", Style(dim=True))
    for token, share, forking in zip(answer.tokens, answer.shares, answer.is_forking, strict=True):
        ink, paper = (f"rgb({','.join(map(str, colour))})" for colour in (LIGHT.ink, LIGHT.background(float(share))))
        style = Style(color=ink, bgcolor=paper, underline=bool(forking), bold=bool(forking))
        text.append("\n".join(visible_lines(token.text)), style)
    return text
