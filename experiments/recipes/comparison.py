"""Models to compare: ten with one size, one variant and one number of parameters.

They differ in the way they read the past (KINDS).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loglinear.fenwick import num_levels
from loglinear.recipes.bytes import byte_model
from loglinear.recipes.recipe import TrainingRecipe

KINDS = (
    "linear",
    "linear_states4",
    "log_linear",
    "log_linear_states4",
    "jittered",
    "capped",
    "routed",
    "selective",
    "hybrid",
    "transformer",
)
ATTENTION_PERIOD, ATTENTION_PLACE = 6, 3  # a hybrid's full attention: the fourth of every six layers
# A routed read of the own 64 tokens, up to 15 blocks of 64 and 15 of 1,024: all of 16,384 tokens. A score finds a
# random key of 64 numbers among 64 in 100 % of trials, among 1,024 in 39 %. The kernels take no largest block.
ROUTED = dict(radix=16, finest_block=64, routing="gram", num_levels=31)
# These kinds learn to read what is TIMES as far back as their training sequences reach: each sequence starts at a
# random position of the tree, so every level and every column of a routed read occurs in training.
JITTERED, TIMES = ("jittered", "routed", "selective"), 8
# The training that all experiments share. A miniature takes minutes on two CPU cores and shows only that all works.
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
# The small models of needles and long texts, of which several seeds of each are affordable.
SMALL_MODEL = dict(hidden_size=256, num_hidden_layers=6, intermediate_size=512, num_heads=8)
EMBEDDINGS = 0.08  # deviation of the first ones; with 0.02, as of the other weights, softmax attention learns late
RATES = {  # of long texts, and of needles but for NEEDLE_RATES: the best of seed 10 in docs/results/needles.md
    "linear": 2e-3,
    "linear_states4": 4e-3,
    "log_linear": 4e-3,
    "log_linear_states4": 4e-3,  # that of linear_states4, not searched
    "jittered": 4e-3,  # that of log_linear, not searched
    "capped": 4e-3,  # after 1,800 steps of the search; no result yet
    "routed": 4e-3,  # that of the log-linear models; the search came later
    "selective": 4e-3,  # that of routed; no result yet
    "hybrid": 4e-3,
    "transformer": 1e-3,
}
SMALL_TRAINING = dict(
    batch_tokens=16_384,
    micro_batch_tokens=16_384,
    warmup_steps=200,
    eval_every=600,
    save_every=600,
)
STATES = 4  # times the keys of a linear model: nearly the bytes of the log-linear one
CAPPED_BY = 2  # levels: tokens an eighth of a sequence away and farther share the last level
WIDTH_STEP = 16  # step of the SwiGLU layers' width, which makes the parameters equal


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
    """Return the recipe EXPERIMENT_KIND, or its miniature with MINIATURE_MODEL for the sizes.

    `kind` is one of KINDS; the training is TRAINING with `training` over it. The log-linear model has the levels of
    `seq_len` tokens, so in a longer sequence the last level holds everything older. `shared` holds the other fields of
    the model's configuration; `about` and `parameters` go into the summary.
    """
    if miniature:
        sizes, training = MINIATURE_MODEL, {**training, **MINIATURE_TRAINING}
    base = byte_model(num_levels=num_levels(seq_len), **sizes, **shared)
    return TrainingRecipe(
        name=f"{experiment}_{kind}{'_miniature' * miniature}",
        summary=f"{parameters} parameters, {about}: {kind.replace('_', '-')}",
        model=model_of_kind(kind, base),
        seq_len=seq_len,
        jitter=(TIMES - 1) * seq_len if kind in JITTERED else None,
        **{**TRAINING, **training},
    )


def small_recipe(
    experiment: str, kind: str, *, shared: Mapping[str, Any], miniature: bool, **given: Any
) -> TrainingRecipe:
    """Return `recipe_of_kind` with SMALL_MODEL, EMBEDDINGS, SMALL_TRAINING and the rate in RATES, or those `given`."""
    return recipe_of_kind(
        experiment,
        kind,
        sizes=SMALL_MODEL,
        shared={**shared, "embedding_range": EMBEDDINGS},
        miniature=miniature,
        **{**SMALL_TRAINING, "learning_rate": RATES[kind], **given},
    )


def model_of_kind(kind: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of LogLinearConfig for one of KINDS.

    `base` is the log-linear model with all levels of its training sequences. It must name num_levels, key_dim,
    hidden_size, num_hidden_layers and intermediate_size. `linear` has one level; `linear_states4` and
    `log_linear_states4` have keys STATES times as wide; `jittered` has the levels of TIMES as many tokens, `capped`
    CAPPED_BY fewer levels, and `routed` the routed read ROUTED; `selective` also weighs its keys. `hybrid` has full
    attention in one layer of six, and at least in one; `transformer` has it in all. The width of the SwiGLU layers, in
    steps of WIDTH_STEP, brings each model to the number of parameters of `base`.
    """
    layers = base["num_hidden_layers"]
    place = min(ATTENTION_PLACE, layers - 1)
    hybrid = ["full_attention" if i % ATTENTION_PERIOD == place else "linear_attention" for i in range(layers)]
    changes: dict[str, dict[str, Any]] = {
        "linear": {"num_levels": 1},
        "linear_states4": {"num_levels": 1, "key_dim": STATES * base["key_dim"]},
        "log_linear": {},
        "log_linear_states4": {"key_dim": STATES * base["key_dim"]},
        "jittered": {"num_levels": base["num_levels"] + num_levels(TIMES) - 1},
        "capped": {"num_levels": base["num_levels"] - CAPPED_BY},
        "routed": ROUTED,
        "selective": {**ROUTED, "routing": "selective_gram"},
        "hybrid": {"layer_types": hybrid},
        "transformer": {"layer_types": ["full_attention"] * layers},
    }
    return widened({**base, **changes[kind]}, parameters_of(base)) if changes[kind] else dict(base)


def widened(model: Mapping[str, Any], wanted: int) -> dict[str, Any]:
    """Return the model with the width of SwiGLU layers that brings it nearest to `wanted` parameters."""
    step = 3 * model["hidden_size"] * model["num_hidden_layers"] * WIDTH_STEP  # parameters: gate, up and down
    wider = WIDTH_STEP * round((wanted - parameters_of(model)) / step)
    return {**model, "intermediate_size": model["intermediate_size"] + wider}


def parameters_of(model: Mapping[str, Any]) -> int:
    """Return the number of parameters of a model with these arguments of LogLinearConfig, tied embeddings once."""
    from loglinear.models import LogLinearConfig, parameter_counts

    return parameter_counts(LogLinearConfig(**model)).total
