"""The needs of a recipe before it can run: options without a default, and files that a command makes."""

from __future__ import annotations

from pathlib import Path

from loglinear.recipes.long_text import TRAINING
from loglinear.recipes.needle import TOKENIZER
from loglinear.recipes.recipe import TrainingRecipe

PREPARED_BY = {TRAINING: "python -m experiments.long_text prepare", TOKENIZER: "python -m experiments.needle prepare"}


def needs(recipe: TrainingRecipe) -> str:
    """Return the options to give or the command to run first in a clone of the repository, or an empty text."""
    options = [f"--{name}" for name in ("tokenizer", "data") if not getattr(recipe, name)]
    commands = [f"`{PREPARED_BY[path]}`" for path in _files(recipe) if path in PREPARED_BY]
    return " ".join(options + commands)


def require_ready(recipe: TrainingRecipe) -> None:
    """Raise ValueError if a recipe names no data, no tokenizer, or a file that is not there yet."""
    missing = [name for name in ("tokenizer", "data") if not getattr(recipe, name)]
    if missing:
        options = {"tokenizer": "--tokenizer (a folder, or 'bytes')", "data": "--data (files, or 'stdlib')"}
        give = " and ".join(options[name] for name in missing)
        raise ValueError(f"recipe {recipe.name!r} names no {' and no '.join(missing)}: give {give}")
    for path in _files(recipe):
        if path in PREPARED_BY and not Path(path).exists():
            command = PREPARED_BY[path]
            raise ValueError(f"recipe {recipe.name!r} needs {path}: run `{command}` in a clone of the repository")


def _files(recipe: TrainingRecipe) -> list[str]:
    return [path for path in (recipe.tokenizer, *recipe.data) if path]
