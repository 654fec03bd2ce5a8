"""`loglinear eval needle`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loglinear import models
from loglinear.cli import console
from loglinear.data.sources import read_documents
from loglinear.evaluation.needle import evaluate_sets, example_sets
from loglinear.evaluation.plots import plot_needle
from loglinear.runs.folder import require_folder
from loglinear.runs.json_files import write_object
from loglinear.runs.loading import load_checkpoint
from loglinear.runs.provenance import command, versions


def run(
    path: Path,
    data: tuple[str, ...],
    out: Path,
    *,
    lengths: list[int],
    tasks: list[str] | None,
    count: int,
    seed: int,
    decode_top_k: int | None,
) -> None:
    """Score every task at every length; write needle.json and needle.png. With decode_top_k answers are decoded."""
    require_folder(out, "--out")
    texts = [document.text for document in read_documents(data)]
    model, tokenizer = load_checkpoint(path, device="cuda" if torch.cuda.is_available() else "cpu")
    if decode_top_k is not None:
        models.set_decode_top_k(model, decode_top_k)
    else:
        decode_top_k = models.decode_top_k(model)
    sets = example_sets(tokenizer, texts, lengths=lengths, count=count, tasks=tasks, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    results = evaluate_sets(model, tokenizer, sets, decode=decode_top_k is not None)
    summary = {"model": str(path), "data": list(data), "seed": seed, "decode_top_k": decode_top_k, "tasks": results}
    write_object(out / "needle.json", {**summary, "versions": versions(), "command": command()})
    plot_needle(out / "needle.png", results)
    rows = [[task, *(_accuracy(result) for result in results[task])] for task in results]
    columns = [f"{length:,}" for length in sorted(set(lengths))]
    read = "" if decode_top_k is None else f", decode steps of {console.count(decode_top_k, 'bucket')}"
    title = f"{path}: share of values found, {console.count(count, 'example')}{read}"
    console.print_table(title, ["tokens", *columns], rows)
    print(f"Figure and results: {out}")


def _accuracy(result: dict[str, Any]) -> str:
    return f"{result['accuracy']:.3f} ± {result['standard_error']:.3f}"
