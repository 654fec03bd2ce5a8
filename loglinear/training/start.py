"""The model of a run at its beginning: new from the recipe, or from a folder.

A folder holds a model of this library, or an upgraded one of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.recipes import TrainingRecipe
from loglinear.runs.checkpoints import resolve
from loglinear.runs.foreign import stored_settings
from loglinear.runs.loading import check_weights, load_model, own_config
from loglinear.runs.upgraded import is_upgraded, upgraded_config
from loglinear.upgrades import new_parameters
from loglinear.upgrades.checkpoint import choices_of


def starting_config(recipe: TrainingRecipe) -> LogLinearConfig:
    """Return the configuration of the recipe's model, or of the folder's; of an upgraded one, the levels.

    Raises ValueError if the recipe starts from a folder that holds no such model, or has an option that an upgraded one
    does not take. Raises it also for a decode_top_k, and for a jitter of a model on which positions have no effect.
    """
    config = _config(recipe)
    layers = sorted({*(config.layer_types or ())})
    if recipe.jitter is not None and (config.num_levels == 1 or "linear_attention" not in layers):
        got = "one level" if "linear_attention" in layers else "softmax attention alone"
        raise ValueError(f"jitter needs linear layers with 2 levels or more, got {got}: leave jitter out")
    if config.decode_top_k is not None:
        raise ValueError(
            "decode_top_k must be null in the configuration of a model that is trained, which reads all buckets, "
            f"got {config.decode_top_k}: change it in config.json"
        )
    return config


def _config(recipe: TrainingRecipe) -> LogLinearConfig:
    if recipe.start is None:
        return recipe.model_config()
    checkpoint = resolve(recipe.start)
    if not is_upgraded(checkpoint):
        return own_config(checkpoint)
    for name in ("compile", "jitter"):
        if getattr(recipe, name):
            raise ValueError(
                f"{name} needs a model of this library, and this run starts from an upgraded one: leave it out"
            )
    config = upgraded_config(checkpoint)
    choices = choices_of(config)
    choices.vocab_size = config.get_text_config().vocab_size
    return choices


def starting_model(recipe: TrainingRecipe, config: LogLinearConfig) -> Any:
    """Return the model that a run trains, in float32 if it has 16 bits, but for an upgraded one with frozen weights.

    In 16 bits a step of the optimiser that is small beside its weight rounds to nothing; the new weights of an upgraded
    model are float32 anyway. The settings of generation are those of the folder, for the folders that the run writes.
    """
    if recipe.start is None:
        return LogLinearForCausalLM(config)
    model = load_model(recipe.start)
    model.generation_config = stored_settings(resolve(recipe.start)) or model.generation_config
    if recipe.new_only:
        new = {id(parameter) for parameter in new_parameters(model).values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in new)
    widens = isinstance(model, LogLinearForCausalLM) or all(p.requires_grad for p in model.parameters())
    return model.float() if widens and model.dtype.itemsize < 4 else model


def prepare_to_resume(checkpoint: Path, recipe: TrainingRecipe, model: Any) -> None:
    """Raise ValueError unless a checkpoint of a run holds its model, and load an upgraded one.

    transformers stores some weights of its models under other names, or experts one by one. Its Trainer would not find
    them again.
    """
    if isinstance(model, LogLinearForCausalLM):
        owner = "the run's recipe" if recipe.start is None else recipe.start
        check_weights(checkpoint, model.config, described_by=owner)
    else:
        model.load_state_dict(load_model(checkpoint).state_dict())


def trained_share(model: Any) -> str | None:
    """Return a note if a run trains only some of the model's parameters."""
    every = model.num_parameters()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trained == every:
        return None
    new = sum(parameter.numel() for parameter in new_parameters(model).values())
    kind = "the new weights" if trained == new else "some weights"
    return f"note: only {kind} are trained, {trained:,} of {every:,} parameters; the others stay as they are"
