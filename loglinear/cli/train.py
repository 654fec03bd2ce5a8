"""`loglinear train`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from loglinear.cli.console import Interrupted, count
from loglinear.recipes import TrainingRecipe, get_recipe
from loglinear.recipes.recipe import MODEL_OVERRIDES


def run(
    out: Path,
    recipe_name: str | None,
    *,
    resume: bool,
    minutes: float | None,
    tensorboard: bool,
    context_parallel: int,
    **overrides: Any,
) -> None:
    """Train, and print where the checkpoint is or how to continue."""
    recipe = _recipe(out, recipe_name, resume, overrides)
    from accelerate import PartialState

    from loglinear.processes import is_main_process
    from loglinear.training import train

    try:
        result = train(
            recipe, out, resume=resume, minutes=minutes, tensorboard=tensorboard, context_parallel=context_parallel
        )
    finally:
        PartialState().destroy_process_group()  # a process that exits while its group's threads run may abort
    if result.interrupted:
        text = (
            f"stopped at step {result.step} of {recipe.steps}, checkpoint saved; continue with: "
            f"loglinear train --resume --out {shlex.quote(str(out))}"
        )
        raise Interrupted(text if is_main_process() else "", result.signal)
    steps = count(result.step, "step")
    if result.was_finished:
        text = f"{recipe.name} had finished its {steps} before, nothing was trained: {result.checkpoint}"
    else:
        text = f"trained {recipe.name} for {steps}: {result.checkpoint}"
    if is_main_process():
        print(text, file=sys.stderr)


def _recipe(out: Path, name: str | None, resume: bool, overrides: dict[str, Any]) -> TrainingRecipe:
    if name is not None:
        recipe = get_recipe(name)
    elif not resume:
        raise ValueError("--recipe is missing: name one (`loglinear info` lists them), or continue a run with --resume")
    if resume:
        from loglinear.runs.folder import run_recipe

        stored = run_recipe(out)
        if name is None:
            recipe = stored
        elif name != stored.name:
            raise ValueError(
                f"--recipe {name} is not the recipe of the run in {out}, which is {stored.name}: "
                "leave out --recipe to continue it"
            )
    variant = overrides.get("variant")
    if variant is not None:
        from loglinear.variants import get_variant

        get_variant(variant)
    if overrides.get("start") is not None:
        for field in MODEL_OVERRIDES:
            if overrides.get(field) is not None:
                raise ValueError(
                    f"--{field.replace('_', '-')} and --model exclude each other: the folder has its model"
                )
        from loglinear.runs.checkpoints import resolve

        overrides["start"] = str(resolve(overrides["start"]))  # of a run, its last checkpoint, where the tokenizer is
        overrides["tokenizer"] = overrides.get("tokenizer") or overrides["start"]
    return recipe.override(**overrides)
