"""Models to compare: five of the same sizes, variant and number of parameters that look back in different ways, and
other choices for the log-linear one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loglinear.fenwick import num_levels
from loglinear.recipes.bytes import byte_model
from loglinear.recipes.recipe import TrainingRecipe

KINDS = ("linear", "log_linear", "capped", "hybrid", "transformer")
ATTENTION_PERIOD, ATTENTION_PLACE = 6, 3  # a hybrid's full attention: the fourth of every six layers
PUBLISHED = {"lambda_form": "softplus"}  # and all levels, each with a lambda of its own, from single tokens on
# What the experiments share; and one in small, for minutes on two CPU cores, which shows no more than that all works.
TRAINING = dict(
    batch_tokens=131_072,
    micro_batch_tokens=65_536,
    eval_tokens=1_048_576,
    learning_rate=2e-3,
    validation_fraction=0.02,
)
MINIATURE_MODEL = dict(hidden_size=96, num_hidden_layers=2, intermediate_size=256, num_heads=3)
MINIATURE_TRAINING = dict(
    batch_tokens=4096,
    micro_batch_tokens=4096,
    steps=120,
    warmup_steps=12,
    eval_every=60,
    eval_tokens=16_384,
    save_every=60,
)
CAPPED_BY = 2  # levels: what is an eighth of a sequence or more away shares the last
WIDTH_STEP = 16  # of the SwiGLU layers, by which parameters are made equal


def choices(*, capped_levels: int) -> dict[str, dict[str, Any]]:
    """Log-linear models that differ from the published one in one thing, as what their configuration says: lambda's two
    other forms, fewer levels, and one lambda for the tokens of a chunk of 64 (a hierarchy of chunks)."""
    changes: dict[str, dict[str, Any]] = {
        "bounded": {"lambda_form": "bounded"},
        "unit": {"lambda_form": "unit"},
        "capped": {"num_levels": capped_levels},
        "blocks": {"finest_block": 64},
    }
    return {name: {**PUBLISHED, **change} for name, change in changes.items()}


def recipe_of_kind(
    experiment: str,
    kind: str,
    *,
    about: str,
    parameters: str,
    sizes: Mapping[str, int],
    shared: Mapping[str, Any],
    seq_len: int,
    miniature: bool,
    **training: Any,
) -> TrainingRecipe:
    """The recipe EXPERIMENT_KIND: a model of one of KINDS with these sizes, TRAINING and `training`; or its miniature,
    with MINIATURE_MODEL for the sizes.

    The log-linear model has the levels of `seq_len` tokens: of a longer text the last holds all that is older. `shared`
    is what else the model's configuration says; `about` and `parameters` are for the summary."""
    if miniature:
        sizes, training = MINIATURE_MODEL, {**training, **MINIATURE_TRAINING}
    base = byte_model(num_levels=num_levels(seq_len), **sizes, **shared)
    return TrainingRecipe(
        name=f"{experiment}_{kind}{'_miniature' * miniature}",
        summary=f"{parameters} parameters, {about}: {kind.replace('_', '-')}",
        model=model_of_kind(kind, base),
        seq_len=seq_len,
        **{**TRAINING, **training},
    )


def model_of_kind(kind: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of LogLinearConfig for one of KINDS.

    `base` is the log-linear model, with all the levels that its training sequences have; it must name num_levels,
    hidden_size, num_hidden_layers and intermediate_size. `linear` has one level, `capped` CAPPED_BY fewer, `hybrid` has
    full attention in one layer of six, and in one at least, `transformer` in all of them. The width of the SwiGLU
    layers, in steps of WIDTH_STEP, makes their parameters as many as those of `base`.
    """
    layers = base["num_hidden_layers"]
    place = min(ATTENTION_PLACE, layers - 1)
    hybrid = ["full_attention" if i % ATTENTION_PERIOD == place else "linear_attention" for i in range(layers)]
    changes: dict[str, dict[str, Any]] = {
        "linear": {"num_levels": 1},
        "log_linear": {},
        "capped": {"num_levels": base["num_levels"] - CAPPED_BY},
        "hybrid": {"layer_types": hybrid},
        "transformer": {"layer_types": ["full_attention"] * layers},
    }
    return _widened({**base, **changes[kind]}, _parameters(base)) if changes[kind] else dict(base)


def _widened(model: dict[str, Any], wanted: int) -> dict[str, Any]:
    """The model with SwiGLU layers of the width that brings it nearest to so many parameters."""
    step = 3 * model["hidden_size"] * model["num_hidden_layers"] * WIDTH_STEP  # parameters: gate, up and down
    wider = WIDTH_STEP * round((wanted - _parameters(model)) / step)
    return {**model, "intermediate_size": model["intermediate_size"] + wider}


def _parameters(model: Mapping[str, Any]) -> int:
    from loglinear.models import LogLinearConfig, parameter_counts

    return parameter_counts(LogLinearConfig(**model)).total
