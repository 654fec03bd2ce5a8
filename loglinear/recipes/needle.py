"""Retrieval from long text at the byte level: five models of 10.7 M parameters, for `loglinear eval needle`."""

from typing import Any

from loglinear.fenwick import num_levels
from loglinear.recipes.bytes import byte_model
from loglinear.recipes.comparison import MINIATURE_MODEL, MINIATURE_TRAINING, model_of_kind
from loglinear.recipes.recipe import TrainingRecipe

LONGEST = 16_384  # tokens, for which the log-linear model has all levels; those past 4,096 are read untrained
CAPPED_LEVELS = 12  # what is 1,024 tokens or more away shares the last
MODEL = dict(hidden_size=320, num_hidden_layers=8, intermediate_size=640, num_heads=10)
TRAINING = dict(
    batch_tokens=131_072,
    micro_batch_tokens=65_536,
    steps=680,
    warmup_steps=60,
    eval_every=85,
    eval_tokens=1_048_576,
    save_every=170,
)


def needle(kind: str, *, miniature: bool = False) -> TrainingRecipe:
    """One of `comparison.KINDS`, on documents of needles in noise and in Python's standard library, and on its files.

    4,096 tokens at a time; 90 M tokens, each once (in miniature the first 0.5 M).
    """
    size, sizes = ("0.3 M", MINIATURE_MODEL) if miniature else ("10.7 M", MODEL)
    base = byte_model(num_levels=num_levels(LONGEST), rope_theta=500_000.0, **sizes)
    training: dict[str, Any] = {**TRAINING, **(MINIATURE_TRAINING if miniature else {})}
    return TrainingRecipe(
        name=f"needle_{kind}{'_miniature' * miniature}",
        summary=f"{size} parameters, needles in haystacks of 4,096 bytes: {kind.replace('_', '-')}",
        model=model_of_kind(kind, base, capped_levels=CAPPED_LEVELS),
        data=("needle:50000:4096:stdlib", "stdlib"),
        seq_len=4096,
        learning_rate=2e-3,
        validation_fraction=0.02,
        **training,
    )
