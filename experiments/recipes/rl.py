"""Reinforcement learning on forking tokens: three kinds of model that learn countdown, and the rounds that follow."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from experiments.countdown import Countdown
from experiments.recipes.comparison import EMBEDDINGS, model_of_kind
from loglinear.fenwick import num_levels
from loglinear.recipes.bytes import byte_model
from loglinear.recipes.recipe import TrainingRecipe

KINDS = ("log_linear", "linear", "transformer")
TASK = Countdown(given=3, largest=20, failures=3, answers=200_000)
LONGEST = 160  # tokens of a problem and its answer
SIZES = dict(hidden_size=256, num_hidden_layers=4, intermediate_size=512, num_heads=8)
MINIATURE_SIZES = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_heads=2)
TOP, ALL, LOWEST = "top20", "all", "lowest80"
TOKENS = (TOP, ALL, LOWEST)
QUANTILE = 0.2  # of the tokens of a batch: those of highest entropy


def base_recipe(kind: str, *, miniature: bool = False) -> TrainingRecipe:
    """Return the recipe of the model that reinforcement learning starts from, of one of KINDS.

    All kinds have equally many parameters, as far as the steps of the SwiGLU layers' width allow, and read the same
    answers. Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"--kind must be one of {', '.join(KINDS)}, got {kind!r}")
    sizes, steps = (MINIATURE_SIZES, 60) if miniature else (SIZES, 1500)
    task = TASK._replace(largest=9, failures=1, answers=4000) if miniature else TASK
    base = byte_model(num_levels=num_levels(LONGEST), rope_theta=10_000.0, embedding_range=EMBEDDINGS, **sizes)
    tokens = 2048 if miniature else 16_384
    return TrainingRecipe(
        name=f"rl_base_{kind}{'_miniature' * miniature}",
        summary=f"{'0.1' if miniature else '3'} M parameters, countdown: {kind.replace('_', '-')}",
        model=model_of_kind(kind, base),
        data=(task.source,),
        seq_len=LONGEST,
        batch_tokens=tokens,
        steps=steps,
        learning_rate=2e-3,
        warmup_steps=steps // 15,
        eval_every=steps // 3,
        eval_tokens=65_536,
        save_every=steps // 3,
        keep_checkpoints=1,
    )


@dataclass(frozen=True, kw_only=True)
class Reinforcement:
    """Rounds of GRPO with DAPO's loss from a trained model. A round samples answers and takes several steps on them."""

    name: str
    tokens: str
    """The tokens that learn, one of TOKENS: a fifth of highest entropy, all, or the others."""
    start: str
    """The folder of the trained model."""
    start_steps: int
    """The steps of its training."""
    task: str
    """The name of a Countdown."""
    seed: int = 0
    rounds: int = 100
    prompts: int = 64
    """Problems of a round, new ones in each."""
    answers: int = 8
    """Sampled answers to each problem, which are compared with one another."""
    updates: int = 4
    """Optimiser steps of a round, each on a part of the answers."""
    longest: int = 112
    """Tokens after which an answer is cut off."""
    learning_rate: float = 3e-5
    clip: tuple[float, float] = (0.2, 0.28)
    """The clipping range: the ratio of probabilities counts from 1 - clip[0] to 1 + clip[1]."""
    quantile: float = QUANTILE
    evaluate_every: int = 10
    """Rounds between two tests on held-out problems, each of which saves a checkpoint."""
    held_out: int = 256
    """Problems of a test."""
    samples: int = 4
    """Sampled answers to each problem of a test."""

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise ValueError(f"--tokens must be one of {', '.join(TOKENS)}, got {self.tokens!r}")
        for name in ("rounds", "prompts", "updates", "longest", "evaluate_every", "held_out", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.answers < 2:
            raise ValueError(f"answers must be at least 2, because they are compared, got {self.answers}")
        if self.prompts * self.answers % self.updates:
            raise ValueError(f"updates must divide {self.prompts} x {self.answers} answers, got {self.updates}")

    @property
    def steps(self) -> int:
        """The optimiser steps of all rounds."""
        return self.rounds * self.updates

    def override(self, **changes: Any) -> Reinforcement:
        """Return the recipe with every change that is not None."""
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**dataclasses.asdict(self), "clip": list(self.clip)}


def reinforcement(kind: str, tokens: str, start: str, *, miniature: bool = False) -> Reinforcement:
    """Return the rounds of one of KINDS and TOKENS. Raises ValueError for others."""
    base = base_recipe(kind, miniature=miniature)
    small = dict(rounds=2, prompts=4, answers=4, updates=2, longest=48, evaluate_every=1, held_out=16, samples=2)
    return Reinforcement(
        name=f"rl_{kind}_{tokens}{'_miniature' * miniature}",
        tokens=tokens,
        start=start,
        start_steps=base.steps,
        task=base.data[0],
        **(small if miniature else {}),  # type: ignore[arg-type]
    )
