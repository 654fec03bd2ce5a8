"""The model of a run at its beginning: new from the recipe, or an upgraded model of transformers from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.recipes import TrainingRecipe
from loglinear.runs.checkpoints import resolve
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
    """Return the model that a run trains; in float32 if all parameters of a 16-bit model are trained.

    In 16 bits a step of the optimiser that is small beside its weight rounds to nothing.
    """
    if recipe.start is None:
        return LogLinearForCausalLM(config)
    model = load_model(recipe.start)
    is_free = all(parameter.requires_grad for parameter in model.parameters())
    return model.float() if is_free and model.dtype.itemsize < 4 else model


def prepare_to_resume(checkpoint: Path, recipe: TrainingRecipe, model: Any) -> None:
    """Raise ValueError unless a checkpoint of a run holds its model, and load an upgraded one.

    transformers stores some weights of its models under other names, or experts one by one. Its Trainer would not find
    them again.
    """
    if recipe.start is None:
        check_weights(checkpoint, model.config, described_by="the run's recipe")
    else:
        model.load_state_dict(load_model(checkpoint).state_dict())
