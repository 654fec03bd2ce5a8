"""`loglinear demo`: a log-linear model beside its linear twin, from data to figures."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from loglinear.cli import console
from loglinear.evaluation import Perplexity, Sample, evaluate_perplexity, sample
from loglinear.evaluation.plots import plot_losses, plot_positions
from loglinear.models import parameter_counts
from loglinear.recipes import TrainingRecipe
from loglinear.training import load_corpus, load_model, load_tokenizer, train
from loglinear.training.files import write_atomically
from loglinear.training.json_files import write_object
from loglinear.training.run_folder import read_metrics

MODELS = ("log_linear", "linear")
EVALUATION_TOKENS = 262_144
SAMPLE_PROMPT = "import os\n\n\ndef "
SAMPLE_TOKENS = 384


@dataclass(frozen=True)
class Measured:
    """What the demo measured of one model."""

    parameters: int
    perplexity: Perplexity
    metrics: list[dict[str, Any]]
    sample: Sample

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        training = [record for record in self.metrics if record["split"] == "train"]
        seconds, tokens = training[-1]["seconds"], training[-1]["tokens"]
        return {
            "parameters": self.parameters,
            "validation": self.perplexity.to_dict(),
            "training_seconds": seconds,
            "training_tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "state_bytes": self.sample.state_bytes,
        }


def run(recipe: TrainingRecipe, out: Path) -> None:
    """Train both models (or continue what is in `out`), evaluate, draw, and print what came out."""
    logging.set_verbosity_error()
    recipes = {"log_linear": recipe, "linear": recipe.override(num_levels=1)}
    for name in MODELS:
        _train(name, recipes[name], out)
    measured = {name: _measure(recipes[name], out / name) for name in MODELS}
    _write(recipe, out, measured)
    _print(recipe, out, measured)


def _train(name: str, recipe: TrainingRecipe, out: Path) -> None:
    resume = (out / name / "run.json").exists()
    if resume:
        print(f"continuing {out / name} (delete the folder to train anew)", file=sys.stderr)
    result = train(recipe, out / name, resume=resume, label=name)
    if result.interrupted:
        raise console.Interrupted(
            f"stopped at step {result.step} of {recipe.steps} of {name}, checkpoint saved; continue with: "
            f"loglinear demo {_options(recipe)} --out {shlex.quote(str(out))}",
            result.signal,
        )


def _options(recipe: TrainingRecipe) -> str:
    return f"--variant {recipe.model['variant']} --steps {recipe.steps} --seed {recipe.seed}"


def _measure(recipe: TrainingRecipe, folder: Path) -> Measured:
    model = load_model(folder)
    tokenizer = load_tokenizer(recipe.tokenizer or "bytes")
    _, validation = load_corpus(recipe.data, tokenizer, recipe.validation_fraction)
    # Twice the training length: what happens past it belongs in the picture.
    result = evaluate_perplexity(model, validation, length=2 * recipe.seq_len, max_tokens=EVALUATION_TOKENS)
    written = sample(model, tokenizer, SAMPLE_PROMPT, max_new_tokens=SAMPLE_TOKENS, temperature=0.7, seed=recipe.seed)
    return Measured(
        parameters=parameter_counts(model.config).total,
        perplexity=result,
        metrics=read_metrics(folder),
        sample=written,
    )


def _write(recipe: TrainingRecipe, out: Path, measured: dict[str, Measured]) -> None:
    lines = [json.dumps({"model": name, **record}) for name in MODELS for record in measured[name].metrics]
    write_atomically(out / "metrics.jsonl", "\n".join(lines) + "\n")
    final = {name: measured[name].perplexity.bits_per_byte for name in MODELS}
    plot_losses(out / "loss.png", {name: measured[name].metrics for name in MODELS}, final)
    curves = {
        name: measured[name].perplexity.by_position() for name in MODELS if len(measured[name].perplexity.nats_NT)
    }
    plot_positions(out / "per_position.png", curves, training_length=recipe.seq_len)
    difference, error = measured["log_linear"].perplexity.difference(measured["linear"].perplexity)
    results = {name: measured[name].to_dict() for name in MODELS}
    summary = {**results, "difference_bits_per_byte": difference, "difference_standard_error": error}
    write_object(out / "results.json", summary)
    write_atomically(out / "sample.txt", measured["log_linear"].sample.text + "\n")


def _print(recipe: TrainingRecipe, out: Path, measured: dict[str, Measured]) -> None:
    print(f"--- written by the log-linear model, after {SAMPLE_PROMPT!r}\n")
    print(measured["log_linear"].sample.text + "\n\n---")
    facts = [measured[name].to_dict() for name in MODELS]
    rows = [
        ["levels", str(recipe.model["num_levels"]), "1"],
        ["parameters", *(f"{fact['parameters']:,}" for fact in facts)],
        ["validation bits per byte", *(str(measured[name].perplexity) for name in MODELS)],
        ["training seconds", *(f"{fact['training_seconds']:.1f}" for fact in facts)],
        ["training tokens/s", *(f"{fact['tokens_per_second']:,.0f}" for fact in facts)],
        ["state while decoding", *(console.human_bytes(fact["state_bytes"]) for fact in facts)],
    ]
    console.print_table(f"{recipe.name}: {recipe.steps} steps", ["", "log-linear", "linear twin"], rows)
    print(verdict(measured["log_linear"].perplexity, measured["linear"].perplexity))
    print(f"figures, metrics and checkpoints: {out}")


def verdict(log_linear: Perplexity, linear: Perplexity) -> str:
    """One honest sentence: which model is better on the validation text, if the difference exceeds twice its error."""
    difference, error = log_linear.difference(linear)
    margin = f"{abs(difference):.4f} ± {error:.4f} bits per byte (paired over {len(log_linear.names)} files)"
    if abs(difference) > 2 * error:
        better = "log-linear model" if difference < 0 else "linear twin"
        return f"The {better} is better on validation text by {margin}; one seed, so not a law."
    return f"No difference beyond its error on validation text: {margin}."
