"""The model of a run at its beginning: new from the recipe, or an upgraded model of transformers from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.recipes import TrainingRecipe
from loglinear.runs.checkpoints import resolve
from loglinear.runs.foreign import weight_files
from loglinear.runs.loading import check_weights, load_model
from loglinear.runs.upgraded import is_upgraded, upgraded_config
from loglinear.upgrades.checkpoint import choices_of


def starting_config(recipe: TrainingRecipe) -> LogLinearConfig:
    """Return the recipe's model; of an upgraded one, its levels and its vocabulary.

    Raises ValueError if the recipe starts from a folder that holds no upgraded model, or compiles one.
    """
    if recipe.start is None:
        return recipe.model_config()
    if recipe.compile:
        raise ValueError("compile needs a new model, and this run starts from an upgraded one: leave it out")
    checkpoint = resolve(recipe.start)
    if not is_upgraded(checkpoint):
        raise ValueError(f"a run starts from an upgraded model, and {checkpoint} holds none: upgrade it first")
    config = upgraded_config(checkpoint)
    choices = choices_of(config)
    choices.vocab_size = config.get_text_config().vocab_size
    return choices


def starting_model(recipe: TrainingRecipe, config: LogLinearConfig) -> Any:
    """Return the model that a run trains."""
    return LogLinearForCausalLM(config) if recipe.start is None else load_model(recipe.start)


def check_resumable(checkpoint: Path, recipe: TrainingRecipe, model: Any) -> None:
    """Raise ValueError unless a checkpoint of a run holds what the run trains."""
    if recipe.start is None:
        check_weights(checkpoint, model.config, described_by="the run's recipe")
        return
    stored: set[str] = set()
    for file in weight_files(checkpoint):
        with safe_open(file, framework="pt") as weights:
            stored |= set(weights.keys())
    missing = sorted(name for name, p in model.named_parameters() if p.requires_grad and name not in stored)
    if missing:
        raise ValueError(
            f"checkpoint {checkpoint} cannot be resumed: transformers stores {missing[0]} under another name; "
            "train the new parameters alone"
        )
