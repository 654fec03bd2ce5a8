"""`loglinear eval needle`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loglinear.cli import console
from loglinear.evaluation import evaluate_needle, needle_examples
from loglinear.evaluation.needle import IN_NOISE, IN_TEXT, TASKS, token_counter
from loglinear.evaluation.plots import plot_needle
from loglinear.training.checkpoints import load_model, resolve
from loglinear.training.json_files import write_object
from loglinear.training.needle import Haystack
from loglinear.training.run_folder import command, versions
from loglinear.training.sources import read_documents
from loglinear.training.tokenizer import load_tokenizer


def run(
    path: Path, data: tuple[str, ...], out: Path, lengths: list[int], tasks: list[str] | None, count: int, seed: int
) -> None:
    """Score every task at every length, write needle.json and needle.png."""
    tasks = tasks or [task for task in TASKS if data or task != IN_TEXT]
    if IN_TEXT in tasks and not data:
        raise ValueError(f"task {IN_TEXT} hides its needle in text: give --data")
    model = load_model(path, device="cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(resolve(path), model.config.vocab_size)
    size = token_counter(tokenizer)
    noise = Haystack.noise(size)
    text = Haystack.of_texts((document.text for document in read_documents(data)), size) if data else noise
    out.mkdir(parents=True, exist_ok=True)

    lengths = sorted(set(lengths))
    sets = {  # made before anything is read: a length that is too short is known at once
        (task, length): needle_examples(
            task, count, length=length, haystack=noise if task == IN_NOISE else text, tokenizer=tokenizer, seed=seed
        )
        for task in dict.fromkeys(tasks)
        for length in lengths
    }
    results: dict[str, list[dict[str, Any]]] = {task: [] for task in tasks}
    for (task, length), examples in sets.items():
        scores = evaluate_needle(model, tokenizer, examples, label=f"{task}, {length:,} tokens")
        results[task].append({"length": length, **scores.to_dict()})
    summary = {"model": str(path), "data": list(data), "seed": seed, "tasks": results}
    write_object(out / "needle.json", {**summary, "versions": versions(), "command": command()})
    plot_needle(out / "needle.png", results)
    rows = [[task, *(_accuracy(result) for result in results[task])] for task in results]
    columns = [f"{length:,}" for length in lengths]
    console.print_table(f"{path}: values found in {count} examples", ["tokens", *columns], rows)
    print(f"figure and results: {out}")


def _accuracy(result: dict[str, Any]) -> str:
    return f"{result['accuracy']:.3f} ± {result['standard_error']:.3f}"
