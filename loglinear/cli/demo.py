"""`loglinear demo`: a log-linear and a linear model, from data to figures."""

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
from loglinear.runs.files import write_atomically
from loglinear.runs.json_files import write_object
from loglinear.runs.metrics import read_metrics
from loglinear.training import load_corpus, load_model, load_tokenizer, train

MODELS = ("log_linear", "linear")
LABELS = {"log_linear": "log-linear", "linear": "linear"}  # on the terminal and in figures
EVALUATION_TOKENS = 262_144
SAMPLE_PROMPT = "import os\n\n\ndef "
SAMPLE_TOKENS = 384


@dataclass(frozen=True)
class Measured:
    """The measurements of one model."""

    parameters: int
    perplexity: Perplexity
    metrics: list[dict[str, Any]]
    sample: Sample

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
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
    """Train both models, or continue them in `out`; evaluate them, draw the figures and print the comparison."""
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
        print(f"continuing {out / name}: delete the folder to train again", file=sys.stderr)
    result = train(recipe, out / name, resume=resume, label=LABELS[name])
    if result.interrupted:
        raise console.Interrupted(
            f"stopped the {LABELS[name]} model at step {result.step} of {recipe.steps}, checkpoint saved; "
            f"continue with: loglinear demo {_options(recipe)} --out {shlex.quote(str(out))}",
            result.signal,
        )


def _options(recipe: TrainingRecipe) -> str:
    return f"--variant {recipe.model['variant']} --steps {recipe.steps} --seed {recipe.seed}"


def _measure(recipe: TrainingRecipe, folder: Path) -> Measured:
    model = load_model(folder)
    tokenizer = load_tokenizer(recipe.tokenizer or "bytes")
    _, validation = load_corpus(recipe.data, tokenizer, recipe.validation_fraction)
    # Twice the training length, so that the figure shows the loss beyond it.
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
    final = {LABELS[name]: measured[name].perplexity.bits_per_byte for name in MODELS}
    plot_losses(out / "loss.png", {LABELS[name]: measured[name].metrics for name in MODELS}, final)
    results_by_label = {LABELS[name]: measured[name].perplexity for name in MODELS}
    curves = {label: result.by_position() for label, result in results_by_label.items() if len(result.nats_NT)}
    plot_positions(out / "per_position.png", curves, training_length=recipe.seq_len)
    difference, error = measured["log_linear"].perplexity.difference(measured["linear"].perplexity)
    results = {name: measured[name].to_dict() for name in MODELS}
    summary = {**results, "difference_bits_per_byte": difference, "difference_standard_error": error}
    write_object(out / "results.json", summary)
    write_atomically(out / "sample.txt", measured["log_linear"].sample.text + "\n")


def _print(recipe: TrainingRecipe, out: Path, measured: dict[str, Measured]) -> None:
    print(f"The log-linear model continues {SAMPLE_PROMPT!r}:\n")
    print(measured["log_linear"].sample.text + "\n")
    facts = [measured[name].to_dict() for name in MODELS]
    rows = [
        ["levels", str(recipe.model["num_levels"]), "1"],
        ["parameters", *(f"{fact['parameters']:,}" for fact in facts)],
        ["validation, bits per byte", *(str(measured[name].perplexity) for name in MODELS)],
        ["training, seconds", *(f"{fact['training_seconds']:.1f}" for fact in facts)],
        ["training, tokens/s", *(f"{fact['tokens_per_second']:,.0f}" for fact in facts)],
        ["state while decoding", *(console.human_bytes(fact["state_bytes"]) for fact in facts)],
    ]
    title = f"{recipe.name}: {recipe.model['variant']}, {console.count(recipe.steps, 'step')}"
    console.print_table(title, ["", *(LABELS[name] for name in MODELS)], rows)
    print(verdict(measured["log_linear"].perplexity, measured["linear"].perplexity))
    print(f"Figures, metrics and checkpoints: {out}")


def verdict(log_linear: Perplexity, linear: Perplexity) -> str:
    """Return a sentence that names the better model if the difference exceeds twice its error."""
    difference, error = log_linear.difference(linear)
    files = console.count(len(log_linear.names), "file")
    margin = f"{abs(difference):.4f} ± {error:.4f} bits per byte (paired over {files})"
    if abs(difference) > 2 * error:
        better = "log-linear" if difference < 0 else "linear"
        return f"The {better} model is better on the validation text by {margin}. This is one seed."
    return f"The models do not differ beyond the error on the validation text: {margin}."
