"""Language modelling of long texts: the data, five models of one size, and what each does within and past its length.

python -m experiments.long_text prepare
python -m experiments.long_text run --kind log_linear --out runs/long_text/log_linear --minutes 9
python -m experiments.figures
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from experiments.prepare import prepare as prepare_corpus
from loglinear.cli import execute
from loglinear.cli.console import Interrupted, print_table
from loglinear.evaluation import evaluate_perplexity
from loglinear.recipes import TrainingRecipe, get_recipe
from loglinear.training import load_model, load_tokenizer, train
from loglinear.training.data import Corpus, read_corpus
from loglinear.training.json_files import write_object
from loglinear.training.run_folder import RUN_FILE, read_metrics, read_run, run_recipe, versions

LENGTHS = (1, 4)  # of the windows that are evaluated, in training lengths
BINS = 4  # of a training length, in the curves of each document
CURVE_POINTS = 100  # that a result keeps of the training loss

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Data = Annotated[Path, typer.Option(help="Folder of train.jsonl.zst and validation.jsonl.zst.")]


@app.command()
def prepare(out: Data = Path("data/long_text")) -> None:
    """Make the two texts out of Debian 12's packages (330 MB to download, some minutes).

    Example:

    python -m experiments.long_text prepare --out data/long_text
    """
    statistics = prepare_corpus(out)
    for name in ("train", "validation"):
        part = statistics[name]
        rows = [[size, f"{of['documents']}", f"{of['bytes'] / 1e6:.1f}"] for size, of in part["documents_of"].items()]
        rows.append(["all", str(part["documents"]), f"{part['bytes'] / 1e6:.1f}"])
        print_table(f"{name}: {part['compressed_bytes'] / 1e6:.1f} MB compressed", ["size", "documents", "MB"], rows)


@app.command()
def run(
    kind: Annotated[str, typer.Option(help="linear, log_linear, capped, hybrid or transformer.")],
    out: Annotated[Path, typer.Option(help="Folder of this model's training run.")],
    data: Data = Path("data/long_text"),
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of 131,072 tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and of the data's order.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Save and stop training (exit code 130) after so long.")] = None,
    results: Annotated[Path, typer.Option(help="Folder for long-text-KIND.json.")] = Path("results"),
) -> None:
    """Train one model, or go on where its run stands, and evaluate it once it is trained.

    A call may be ended at any time: the next one goes on from the last checkpoint. The evaluation is not counted in
    --minutes.

    Example, to be called until it exits with 0:

    python -m experiments.long_text run --kind log_linear --out runs/long_text/log_linear --minutes 9
    """
    training, validation = data / "train.jsonl.zst", data / "validation.jsonl.zst"
    for file in (training, validation):
        if not file.is_file():
            raise ValueError(f"there is no {file}: make it with `python -m experiments.long_text prepare`")
    name = f"long_text_{kind}"
    recipe = run_recipe(out) if (out / RUN_FILE).exists() else get_recipe(name)
    if recipe.name != name:
        raise ValueError(f"--out {out} holds a run of {recipe.name}, expected {name}")
    recipe = recipe.override(data=(str(training),), steps=steps, seed=seed)
    result = train_and_evaluate(recipe, validation, out, minutes=minutes, label=kind)
    suffix = f"-seed{recipe.seed}" if recipe.seed else ""
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"long-text-{kind}{suffix}.json"
    write_object(file, {"kind": kind, **result})
    print(f"written to {file}")


def train_and_evaluate(
    recipe: TrainingRecipe, validation: Path, out: Path, *, minutes: float | None = None, label: str | None = None
) -> dict[str, Any]:
    """Train `recipe` in the folder `out`, or go on there, and return what a result file says.

    Raises Interrupted where a signal, or the minutes, stopped the training before its end: call it again.
    """
    state = train(recipe, out, resume=(out / RUN_FILE).exists(), minutes=minutes, label=label)
    if state.interrupted:
        raise Interrupted(f"stopped at step {state.step} of {recipe.steps}, saved in {out}: the same command goes on")
    stored = read_run(out)
    return {
        "seed": recipe.seed,
        "parameters": stored["parameters"],
        "command": sys.argv,
        "versions": versions(),
        "recipe": recipe.to_dict(),
        "data": stored["data"],
        "training": training_summary(read_metrics(out)),
        "evaluation": evaluate(recipe, validation, out),
    }


def training_summary(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Cost and course of a training run: minutes of its steps alone, and the loss averaged over stretches of steps."""
    steps = [record for record in metrics if record["split"] == "train"]
    tokens, seconds = steps[-1]["tokens"], steps[-1]["seconds"]
    peaks = [record["peak_bytes"] for record in steps if "peak_bytes" in record]
    width = math.ceil(len(steps) / CURVE_POINTS)
    stretches = [steps[start : start + width] for start in range(0, len(steps), width)]
    curve = [
        {
            "step": part[-1]["step"],
            "split": "train",
            "bits_per_byte": float(np.mean([r["bits_per_byte"] for r in part])),
        }
        for part in stretches
    ]
    validation = [
        {name: record[name] for name in ("step", "split", "bits_per_byte")}
        for record in metrics
        if record["split"] == "validation"
    ]
    return {
        "steps": steps[-1]["step"],
        "tokens": tokens,
        "minutes": seconds / 60,
        "tokens_per_second": tokens / seconds,
        "peak_bytes": max(peaks, default=None),
        "curve": [*curve, *validation],
    }


def evaluate(recipe: TrainingRecipe, validation: Path, out: Path) -> dict[str, Any]:
    """The trained model on the beginning of every long validation document, in windows of each of LENGTHS.

    All windows together are the same text, so that the lengths can be compared: as many tokens of each document as the
    longest window has. On a GPU in bfloat16, as in training.
    """
    longest = max(LENGTHS) * recipe.seq_len
    corpus = _longer_than(longest, read_corpus([str(validation)], load_tokenizer(recipe.tokenizer or "bytes")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(out, device=device)
    found = {"documents": len(corpus.names), "fingerprint": corpus.fingerprint}
    for length in (times * recipe.seq_len for times in LENGTHS):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            result = evaluate_perplexity(model, corpus, length=length, max_tokens=longest * len(corpus.names))
        found[str(length)] = {**result.to_dict(), "by_document": result.by_document(recipe.seq_len // BINS)}
    return found


def _longer_than(tokens: int, corpus: Corpus) -> Corpus:
    long = [d for d in range(len(corpus.names)) if len(corpus.document(d)) >= tokens]
    if not long:
        raise ValueError(f"the validation text has no document of {tokens:,} tokens")
    return corpus.take(long)


if __name__ == "__main__":
    execute(app, "python -m experiments.long_text")
