"""`loglinear eval perplexity`."""

from __future__ import annotations

from pathlib import Path

import torch

from loglinear.cli import console
from loglinear.data.corpus import read_corpus
from loglinear.evaluation import evaluate_perplexity
from loglinear.evaluation.plots import plot_positions
from loglinear.models import decode_top_k
from loglinear.runs.folder import require_folder
from loglinear.runs.json_files import write_object
from loglinear.runs.loading import load_checkpoint


def run(path: Path, data: tuple[str, ...], out: Path, *, length: int, max_tokens: int) -> None:
    """Score all of the data; write perplexity.json and per_position.png."""
    require_folder(out, "--out")
    model, tokenizer = load_checkpoint(path, device="cuda" if torch.cuda.is_available() else "cpu")
    console.note_all_buckets("perplexity", decode_top_k(model))
    corpus = read_corpus(data, tokenizer, progress=True)
    out.mkdir(parents=True, exist_ok=True)
    result = evaluate_perplexity(model, corpus, length=length, max_tokens=max_tokens)
    summary = {"model": str(path), "data": list(data), **result.to_dict()}
    write_object(out / "perplexity.json", summary)
    rows = [
        ["bits per byte", f"{result} (over documents)"],
        ["perplexity per token", f"{summary['perplexity']:.4f}"],
        ["documents", f"{summary['documents']:,}"],
        ["tokens", f"{summary['tokens']:,}"],
        ["window", f"{length:,} tokens"],
    ]
    if len(result.nats_NT):
        plot_positions(out / "per_position.png", {path.name: result.by_position()})
        rows.append(["curve", str(out / "per_position.png")])
    else:
        rows.append(["curve", f"none: no document has {length:,} tokens (lower --length)"])
    console.print_table(str(path), ["", "value"], rows)
