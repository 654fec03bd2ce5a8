"""Retrieval from long text: six models of 12 M parameters, for `loglinear eval needle`."""

from experiments.recipes.comparison import recipe_of_kind
from loglinear.recipes.recipe import TrainingRecipe

SEQUENCE = 4096  # tokens
VOCABULARY = 4096  # tokens; the long texts have bytes, but a key of eleven bytes is hard to recognise
TOKENIZER = "data/needle/tokenizer"  # `python -m experiments.needle prepare` makes it


def needle(kind: str, *, miniature: bool = False) -> TrainingRecipe:
    """Return the recipe of one of `comparison.KINDS` on needles in noise and in Python's standard library.

    The files of the standard library are training text too. Sequences have 4,096 tokens; a run reads 197 M.
    """
    return recipe_of_kind(
        "needle",
        kind,
        about=f"needles in haystacks of {SEQUENCE:,} tokens",
        parameters="0.7 M" if miniature else "12 M",
        sizes=dict(hidden_size=320, num_hidden_layers=8, intermediate_size=640, num_heads=10),
        shared=dict(vocab_size=VOCABULARY, rope_theta=10_000.0),
        miniature=miniature,
        tokenizer=TOKENIZER,
        data=(f"needle:{6000 if miniature else 300_000}:12000:stdlib", "stdlib"),
        seq_len=SEQUENCE,
        batch_tokens=32_768,
        micro_batch_tokens=32_768,
        steps=6000,
        warmup_steps=200,
        eval_every=600,
        save_every=600,
    )
