"""Retrieval from long text at the byte level: five models of 10.7 M parameters, for `loglinear eval needle`."""

from loglinear.fenwick import num_levels
from loglinear.recipes.comparison import recipe_of_kind
from loglinear.recipes.recipe import TrainingRecipe

LONGEST = 16_384  # tokens, for which the log-linear model has all levels; those past 4,096 are read untrained
CAPPED_LEVELS = 12  # what is 1,024 tokens or more away shares the last


def needle(kind: str, *, miniature: bool = False) -> TrainingRecipe:
    """One of `comparison.KINDS`, on documents of needles in noise and in Python's standard library, and on its files.

    4,096 tokens at a time; 295 M tokens, about all there are (in miniature the first 0.5 M). Steps are small and many:
    in 680 of 131,072 tokens, with a loss that counted new keys and values too, no model learnt to copy.
    """
    return recipe_of_kind(
        "needle",
        kind,
        about="needles in haystacks of 4,096 bytes",
        parameters="10.7 M",
        sizes=dict(hidden_size=320, num_hidden_layers=8, intermediate_size=640, num_heads=10),
        levels=num_levels(LONGEST),
        capped_levels=CAPPED_LEVELS,
        miniature=miniature,
        data=("needle:400000:4096:stdlib", "stdlib"),
        seq_len=4096,
        batch_tokens=32_768,
        micro_batch_tokens=32_768,
        steps=9000,
        warmup_steps=200,
        eval_every=900,
        save_every=900,
    )
