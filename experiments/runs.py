"""What the drivers share: a model is trained in as many calls as that takes, then evaluated, and its result written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from loglinear.cli.console import Interrupted
from loglinear.models import LogLinearForCausalLM
from loglinear.recipes import TrainingRecipe, get_recipe
from loglinear.recipes.comparison import KINDS
from loglinear.training import load_model, train
from loglinear.training.json_files import write_object
from loglinear.training.run_folder import RUN_FILE, command, read_metrics, read_run, run_recipe, versions

CURVE_POINTS = 100  # that a result keeps of the training loss

Kind = Annotated[str, typer.Option(help="linear, log_linear, capped, hybrid or transformer.")]
Out = Annotated[Path, typer.Option(help="Folder of this model's training run.")]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps, instead of the recipe's.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens read at once, instead of the recipe's: to try things out.")]
BatchTokens = Annotated[
    int | None, typer.Option(help="Tokens of a step, instead of the recipe's 131,072, which want a GPU of 80 GB.")
]
Seed = Annotated[int | None, typer.Option(help="Of the weights and of the data's order.")]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="torch.compile for the blocks; where there is a GPU, the default."),
]
Minutes = Annotated[float | None, typer.Option(help="Save and stop training (exit code 130) after so long.")]
Results = Annotated[Path, typer.Option(help="Folder for the result, a JSON file.")]


def program(text: str | None) -> typer.Typer:
    """A command line with subcommands, and this text as its --help."""
    app = typer.Typer(help=text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(lambda: None)  # or typer would take the name of an only command away
    return app


def train_and_evaluate(
    recipe: TrainingRecipe,
    out: Path,
    evaluate: Callable[[LogLinearForCausalLM, TrainingRecipe], dict[str, Any]],
    result: Path,
    *,
    minutes: float | None = None,
    **overrides: Any,
) -> None:
    """Train a recipe in the folder `out`, or go on there; once it is trained evaluate it and write the file `result`.

    `overrides` are those of `TrainingRecipe.override`. The result of a seed that is not 0 has it in its file's name. On
    a GPU the evaluation is in bfloat16, as the training is.

    Raises Interrupted where a signal, or the minutes, stopped the training before its end: call it again. Raises
    ValueError where `out` holds a run of another recipe.
    """
    recipe = begun(recipe, out, **overrides)
    state = train(recipe, out, resume=(out / RUN_FILE).exists(), minutes=minutes, label=result.stem)
    if state.interrupted:
        raise Interrupted(f"stopped at step {state.step} of {recipe.steps}, saved in {out}: the same command goes on")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        evaluation = evaluate(load_model(out, device=device), recipe)
    stored = read_run(out)
    if recipe.seed:
        result = result.with_stem(f"{result.stem}-seed{recipe.seed}")
    result.parent.mkdir(parents=True, exist_ok=True)
    written = {
        "seed": recipe.seed,
        "parameters": stored["parameters"],
        "command": command(),
        "versions": versions(),
        "recipe": recipe.to_dict(),
        "data": stored["data"],
        "training": training_summary(read_metrics(out)),
        "evaluation": evaluation,
    }
    write_object(result, written)
    print(f"written to {result}")


def kind_recipe(experiment: str, kind: str) -> TrainingRecipe:
    """The recipe EXPERIMENT_KIND. Raises ValueError for a kind that is none."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return get_recipe(f"{experiment}_{kind}")


def begun(recipe: TrainingRecipe, out: Path, *, compile: bool | None = None, **overrides: Any) -> TrainingRecipe:
    """The recipe of the run in the folder `out`, or `recipe` where there is none, with what is given put in."""
    if (out / RUN_FILE).exists():
        name, recipe = recipe.name, run_recipe(out)
        if recipe.name != name:
            raise ValueError(f"--out {out} holds a run of {recipe.name}, expected {name}")
    elif compile is None:
        compile = torch.cuda.is_available()
    return recipe.override(compile=compile, **overrides)


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
