"""The part that all experiments share: train a model in as many calls as needed, evaluate it, write its result."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import torch
import typer

from experiments.recipes.comparison import KINDS
from experiments.recipes.long_text import long_text, long_text_16k
from experiments.recipes.needle import needle
from experiments.results import require_replaceable, result_file
from loglinear.cli.console import Interrupted
from loglinear.cli.options import COUNT, RATE, SEED, TOKENS, Minutes, of_recipe
from loglinear.data.corpus import Corpus
from loglinear.models import LogLinearForCausalLM
from loglinear.recipes import TrainingRecipe
from loglinear.runs.folder import RUN_FILE, read_run, require_folder, run_recipe
from loglinear.runs.json_files import write_object
from loglinear.runs.metrics import read_metrics
from loglinear.runs.provenance import command, versions
from loglinear.training import load_model, train

EXPERIMENTS = {"long_text_8k": long_text, "long_text": long_text_16k, "needle": needle}  # by the names of recipes
CURVE_POINTS = 100  # of the training loss in a result

Kind = Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")]
Out = Annotated[Path, typer.Option(help="Folder of this model's training run.")]


@dataclass(frozen=True)
class Options:
    """The options of every `run`: the training, and the folder of the result."""

    steps: Annotated[int | None, of_recipe("Optimiser steps.", **COUNT)] = None
    seq_len: Annotated[int | None, of_recipe("Length of the longest sequence, in tokens.", **TOKENS)] = None
    batch_tokens: Annotated[int | None, of_recipe("Tokens per step; fewer take less memory.", **TOKENS)] = None
    learning_rate: Annotated[float | None, of_recipe("Peak of the learning rate.", **RATE)] = None
    seed: Annotated[int | None, of_recipe("Seed of the weights and of the data's order.", **SEED)] = None
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the blocks.", show_default="compile on a GPU"),
    ] = None
    miniature: Annotated[
        bool,
        typer.Option("--miniature", help="Train a small model for minutes on a CPU, to see that everything works."),
    ] = False
    minutes: Minutes = None
    results: Annotated[
        Path, typer.Option(help="Folder for the JSON file of the result; that of a miniature goes to miniature/ in it.")
    ] = Path("results")

    @property
    def overrides(self) -> dict[str, Any]:
        """The options that change the recipe."""
        return {name: value for name, value in vars(self).items() if name not in ("miniature", "minutes", "results")}


def with_options(run: Callable[..., None]) -> Callable[..., None]:
    """Return the command with an option for each field of Options in place of its parameter `options`."""
    hints = get_type_hints(run, include_extras=True) | get_type_hints(Options, include_extras=True)
    own = [parameter for name, parameter in inspect.signature(run).parameters.items() if name != "options"]
    shared = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default) for f in fields(Options)]

    @functools.wraps(run)
    def command_line(*args: Any, **given: Any) -> None:
        options = {parameter.name: given.pop(parameter.name) for parameter in shared if parameter.name in given}
        run(*args, **given, options=Options(**options))

    parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in [*own, *shared]]
    command_line.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command_line.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command_line


def program(text: str | None) -> typer.Typer:
    """Return a command line with subcommands whose --help shows this text."""
    app = typer.Typer(help=text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(lambda: None)  # without it typer would drop the name of an only command
    return app


def train_and_evaluate(
    recipe: TrainingRecipe,
    out: Path,
    evaluate: Callable[[LogLinearForCausalLM, TrainingRecipe], dict[str, Any]],
    name: str,
    options: Options,
    *,
    eval_settings: dict[str, Any] | None = None,
    corpora: Callable[[TrainingRecipe], tuple[Corpus, Corpus]] | None = None,
    equal_rows: bool = False,
    **overrides: Any,
) -> None:
    """Train or resume a recipe in the folder `out`, evaluate the trained model, and write NAME.json.

    `eval_settings` holds the settings of the evaluation, which the result repeats. `corpora` returns the data of the
    run's recipe, for training and validation; None: the training reads them. The minutes of the training include it.
    `equal_rows` is that of `train`; nothing is compiled then. `overrides` are further arguments of
    `TrainingRecipe.override`. A seed other than 0 is part of the file's name. On a
    GPU the evaluation is in bfloat16, as the training is.

    Raises Interrupted if a signal or the minutes stopped the training before its end: call it again. Raises ValueError
    if `out` holds a run of another recipe, or NAME.json a result of another recipe, evaluation or training data.
    """
    eval_settings = eval_settings or {}
    given = {**options.overrides, **overrides}
    if equal_rows and given["compile"] is None:
        given["compile"] = False
    recipe = recipe_of_run(recipe, out, **given)
    result = result_file(options.results / "miniature" if options.miniature else options.results, name, recipe.seed)
    for folder in (options.results, result.parent):
        require_folder(folder, "--results")
    result.parent.mkdir(parents=True, exist_ok=True)
    resume = (out / RUN_FILE).exists()
    require_replaceable(result, recipe, eval_settings, read_run(out)["data"] if resume else None)
    started, minutes = time.monotonic(), options.minutes
    data = None if corpora is None else corpora(recipe)
    if minutes is not None:
        minutes = max(minutes - (time.monotonic() - started) / 60, 1e-9)
    state = train(recipe, out, resume=resume, minutes=minutes, label=name, corpora=data, equal_rows=equal_rows)
    if state.interrupted:
        text = (
            f"stopped at step {state.step} of {recipe.steps}, checkpoint saved in {out}; continue with the same command"
        )
        raise Interrupted(text, state.signal)
    evaluate_run(recipe, out, evaluate, result, eval_settings)


def evaluate_run(
    recipe: TrainingRecipe,
    out: Path,
    evaluate: Callable[[LogLinearForCausalLM, TrainingRecipe], dict[str, Any]],
    result: Path,
    eval_settings: dict[str, Any],
) -> None:
    """Evaluate the model of a finished run in the folder `out`, and write the file `result`.

    Raises ValueError if the file holds a result of another recipe, evaluation or training data.
    """
    stored = read_run(out)
    require_replaceable(result, recipe, eval_settings, stored["data"])  # before a long evaluation; the checkpoint stays
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        evaluation = evaluate(load_model(out, device=device), recipe)
    written = {
        "seed": recipe.seed,
        "parameters": stored["parameters"],
        "command": command(),
        "versions": versions(),
        "recipe": recipe.to_dict(),
        "data": stored["data"],
        "training": training_summary(read_metrics(out)),
        "evaluation": {**eval_settings, **evaluation},
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    write_object(result, written)
    print(f"result: {result}")


def kind_recipe(experiment: str, kind: str, miniature: bool) -> TrainingRecipe:
    """Return the recipe EXPERIMENT_KIND, or its miniature. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return EXPERIMENTS[experiment](kind, miniature=miniature)


def recipe_of_run(
    recipe: TrainingRecipe, out: Path, *, compile: bool | None = None, **overrides: Any
) -> TrainingRecipe:
    """Return the recipe of the run in the folder `out`, or else `recipe`, with the overrides."""
    if (out / RUN_FILE).exists():
        name, recipe = recipe.name, run_recipe(out)
        if recipe.name != name:
            raise ValueError(f"--out {out} holds a run of {recipe.name}, expected {name}")
    elif compile is None:
        compile = torch.cuda.is_available()
    return recipe.override(compile=compile, **overrides)


def training_summary(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the cost and the course of a training run.

    These are the minutes of its steps, compilation included, the speed of the median step, and the loss averaged over
    intervals of steps.
    """
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
        "tokens_per_second": float(np.median([record["tokens_per_second"] for record in steps])),
        "peak_bytes": max(peaks, default=None),
        "curve": [*curve, *validation],
    }
