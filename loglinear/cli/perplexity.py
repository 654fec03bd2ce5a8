"""`loglinear eval perplexity`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from loglinear.cli import console
from loglinear.evaluation import evaluate_perplexity
from loglinear.evaluation.plots import plot_positions
from loglinear.training.checkpoints import load_model, resolve
from loglinear.training.data import tokenize
from loglinear.training.run_folder import write_atomically
from loglinear.training.sources import read_documents
from loglinear.training.tokenizer import load_tokenizer


def run(path: Path, data: tuple[str, ...], out: Path, *, length: int, max_tokens: int) -> None:
    """Evaluate all of the data (nothing is held out here), write perplexity.json and per_position.png."""
    model = load_model(path, device="cuda" if torch.cuda.is_available() else "cpu")
    corpus = tokenize(read_documents(data), load_tokenizer(resolve(path)))
    out.mkdir(parents=True, exist_ok=True)
    result = evaluate_perplexity(model, corpus, length=length, max_tokens=max_tokens)
    summary = {"model": str(path), "data": list(data), **result.to_dict()}
    write_atomically(out / "perplexity.json", json.dumps(summary, indent=2) + "\n")
    rows = [
        ["bits per byte", f"{result.bits_per_byte:.4f} ± {result.standard_error:.4f} (over documents)"],
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
