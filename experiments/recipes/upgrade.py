"""Recipes of an upgrade: a linear model of 6 M parameters, and five ways to train it a little more.

The linear model has keys of 256 numbers: with 6,000 steps such a one found needles with every seed
(docs/results/needles.md). With keys of 64 numbers the seed decided, and learning took three times the steps. With the
2,000 steps below, the one model that was trained found no needle. `run --base` starts from a model of 6,000 steps.

Tokens, and an estimate of the seconds of one H200, eagerly: 1.0 M tokens a second in training for linear and levels,
half of it for routed, and three times as many in evaluation:

    linear model            32.8 M in training, 6.2 M in evaluation      35 s
    linear, levels           8.2 M,             5.6 M                    10 s each, 9 of them
    routed                   8.2 M,             5.6 M                    20 s each, 6 of them

Alone it would take about 250 s. Runs that shared the GPU reached 0.14 M tokens a second with linear, 0.07 M with levels
and 0.05 M with routed models. The experiment is smaller than it could be: one linear model, not one for each seed; 6 M
parameters, not 13; 500 steps, not 1,000; and 50 examples of a task and length.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from experiments.recipes.needle import LONGEST, SEQUENCE, needle
from loglinear.recipes.recipe import TrainingRecipe

BASE = "base"
BASE_SEED = 10  # that of the search for its rate
NEW_RATE, ALL_RATE = 2e-3, 5e-4  # peaks of the learning rate: for new weights alone, and for all
VALIDATION_TOKENS = 262_144


class Sizes(NamedTuple):
    """The sizes of the experiment, in tokens if nothing else is said."""

    window: int
    """The sequences of the continued training."""
    longest: int
    """The longest examples. The upgraded model tells as many tokens apart, and jitter trains all its levels."""
    lengths: tuple[int, ...]
    """The examples."""
    data: tuple[str, ...]
    """The text of the continued training, with needles."""
    steps: int
    text: int
    """The text whose bits per byte are measured."""


WINDOW = 4 * SEQUENCE
FULL = Sizes(
    window=WINDOW,
    longest=8 * SEQUENCE,
    lengths=(SEQUENCE // 4, SEQUENCE, 4 * SEQUENCE, 8 * SEQUENCE),
    data=(f"needle:12000:{WINDOW * LONGEST // SEQUENCE}:stdlib", "stdlib"),
    steps=500,
    text=1_048_576,
)
MINIATURE = Sizes(window=2048, longest=4096, lengths=(1024, 2048), data=("needle:40:3000",), steps=2, text=8192)


class Continuation(NamedTuple):
    """One way to go on from the linear model."""

    form: str
    """The weights of the levels: none, from the token alone as published, or from the buckets' contents too."""
    new_only: bool
    """True: the new weights are trained, and the linear model's stay."""


CONTINUATIONS = {
    "linear": Continuation("linear", False),
    "levels_new": Continuation("levels", True),
    "levels_all": Continuation("levels", False),
    "routed_new": Continuation("routed", True),
    "routed_all": Continuation("routed", False),
}


def base_recipe(*, miniature: bool = False) -> TrainingRecipe:
    """Return the recipe of the linear model: needle_linear_states4 in a third of its steps, or one for seconds."""
    recipe = dataclasses.replace(
        needle("linear" if miniature else "linear_states4", miniature=miniature),
        name=f"upgrade_{BASE}{'_miniature' * miniature}",
        seed=BASE_SEED,
        eval_tokens=VALIDATION_TOKENS,
    )
    if not miniature:
        return dataclasses.replace(recipe, steps=2000, eval_every=500, save_every=250)
    return dataclasses.replace(
        recipe,
        tokenizer="bytes",
        data=("needle:40:2000",),
        seq_len=1024,
        batch_tokens=2048,
        micro_batch_tokens=2048,
        eval_tokens=2048,
        steps=4,
        warmup_steps=1,
        eval_every=4,
        save_every=2,
    )


def found_recipe(finished: TrainingRecipe) -> TrainingRecipe:
    """Return the recipe of a finished linear model under the name that a result of this experiment has."""
    return dataclasses.replace(finished, name=f"upgrade_{finished.name}_{BASE}")


def continuation(base: TrainingRecipe, kind: str, sizes: Sizes, start: Path) -> TrainingRecipe:
    """Return the recipe of one of CONTINUATIONS, from the model in the folder `start`.

    Sequences of an upgraded model start at random positions of its tree. A linear model does not depend on them.
    """
    form, new_only = CONTINUATIONS[kind]
    trained = "the new weights" if new_only else "all weights"
    return dataclasses.replace(
        base,
        name=base.name.replace(BASE, kind),
        summary=f"a linear model goes on: {form}, {trained}, {sizes.window:,} tokens at a time",
        model={},
        start=str(start),
        data=sizes.data,
        seq_len=sizes.window,
        steps=sizes.steps,
        warmup_steps=max(1, sizes.steps // 20),
        learning_rate=NEW_RATE if new_only else ALL_RATE,
        eval_every=max(1, sizes.steps // 2),
        eval_tokens=min(base.eval_tokens, VALIDATION_TOKENS),
        save_every=max(1, sizes.steps // 4),
        jitter=None if form == "linear" else sizes.longest - sizes.window,
        new_only=new_only or None,
    )
