"""Retrieval from long text at the byte level: five models of 10.7 M parameters, for `loglinear eval needle`."""

from loglinear.fenwick import num_levels
from loglinear.recipes.bytes import byte_model
from loglinear.recipes.comparison import model_of_kind
from loglinear.recipes.recipe import TrainingRecipe

LONGEST = 16_384  # tokens, for which the log-linear model has all levels
CAPPED_LEVELS = 12  # what is 1,024 tokens or more away shares the last


def needle(kind: str) -> TrainingRecipe:
    """One of `comparison.KINDS`, on documents of needles in noise and in Python's standard library, and on its files.

    4,096 tokens at a time; 90 M tokens, each once.
    """
    base = byte_model(
        hidden_size=320,
        num_hidden_layers=8,
        intermediate_size=640,
        num_levels=num_levels(LONGEST),
        num_heads=10,
        rope_theta=500_000.0,
    )
    return TrainingRecipe(
        name=f"needle_{kind}",
        summary=f"10.7 M parameters, needles in haystacks of 4,096 bytes: {kind.replace('_', '-')}",
        model=model_of_kind(kind, base, capped_levels=CAPPED_LEVELS),
        data=("needle:50000:4096:stdlib", "stdlib"),
        seq_len=4096,
        batch_tokens=131_072,
        micro_batch_tokens=65_536,
        steps=680,
        learning_rate=2e-3,
        warmup_steps=60,
        eval_every=85,
        eval_tokens=1_048_576,
        save_every=170,
        validation_fraction=0.02,
    )
