"""What a recipe needs before it can run: options that are yours to give, files that a command makes."""

from __future__ import annotations

from pathlib import Path

from loglinear.recipes.long_text import TRAINING
from loglinear.recipes.needle import TOKENIZER
from loglinear.recipes.recipe import TrainingRecipe

PREPARED_BY = {TRAINING: "python -m experiments.long_text prepare", TOKENIZER: "python -m experiments.needle prepare"}


def needs(recipe: TrainingRecipe) -> str:
    """The options to give, or the command to run first in a clone of the repository; empty where there is nothing."""
    options = [f"--{name}" for name in ("tokenizer", "data") if not getattr(recipe, name)]
    commands = [f"`{PREPARED_BY[path]}`" for path in _files(recipe) if path in PREPARED_BY]
    return " ".join(options + commands)


def require_ready(recipe: TrainingRecipe) -> None:
    """Raise ValueError where a recipe names no data or tokenizer, or files that a command has yet to make."""
    missing = [name for name in ("tokenizer", "data") if not getattr(recipe, name)]
    if missing:
        options = {"tokenizer": "--tokenizer (a folder, or 'bytes')", "data": "--data (files, or 'stdlib')"}
        give = " and ".join(options[name] for name in missing)
        raise ValueError(f"recipe {recipe.name!r} names no {' and no '.join(missing)}: give {give}")
    for path in _files(recipe):
        if path in PREPARED_BY and not Path(path).exists():
            command = PREPARED_BY[path]
            raise ValueError(f"there is no {path}: `{command}`, in a clone of the repository, makes it")


def _files(recipe: TrainingRecipe) -> list[str]:
    return [path for path in (recipe.tokenizer, *recipe.data) if path]
