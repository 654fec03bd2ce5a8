"""Language modelling of long texts at the byte level: seven models of 13.3 M parameters.

`experiments.long_text` prepares the data, trains the models and evaluates them.
"""

from experiments.recipes.comparison import recipe_of_kind
from loglinear.recipes.recipe import TrainingRecipe

SEQUENCE = 16_384
TRAINING = "data/long_text/train.jsonl.zst"  # `python -m experiments.long_text prepare` makes it


def long_text(kind: str, *, miniature: bool = False) -> TrainingRecipe:
    """Return the recipe of one of `comparison.KINDS` on sources and manuals of 64 KiB to 1 MiB.

    Sequences have 16,384 tokens, those of the miniature 1,024.
    """
    sequence = SEQUENCE // 16 if miniature else SEQUENCE
    return recipe_of_kind(
        "long_text",
        kind,
        about=f"long texts, {sequence:,} bytes at a time",
        parameters="0.3 M" if miniature else "13.3 M",
        sizes=dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1024, num_heads=12),
        shared=dict(rope_theta=500_000.0),
        miniature=miniature,
        data=(TRAINING,),
        seq_len=sequence,
        batch_tokens=65_536,
        steps=6000,  # the whole text twice
        warmup_steps=150,
        eval_every=600,
        save_every=600,
    )
