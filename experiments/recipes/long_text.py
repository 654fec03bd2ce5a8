"""Language modelling of long texts at the byte level: ten models of 5.2 M parameters, and an earlier round of 13.3 M.

`experiments.long_text` prepares the data, trains the models and evaluates them.
"""

from experiments.recipes.comparison import recipe_of_kind, small_recipe
from loglinear.recipes.recipe import TrainingRecipe

SEQUENCE = 8192
SEQUENCE_16K = 16_384
ROTARY_BASE = 500_000.0  # of longer windows than the needles'
TRAINING = "data/long_text/train.jsonl.zst"  # `python -m experiments.long_text prepare` makes it


def long_text(kind: str, *, miniature: bool = False) -> TrainingRecipe:
    """Return the recipe of one of `comparison.KINDS` in the size of the needles' models.

    Sequences have 8,192 tokens, those of the miniature 1,024. A run reads 59 M bytes, a third of the text, none twice.
    The learning rates are those of the needles: no rate was searched on these texts.
    """
    sequence = SEQUENCE // 8 if miniature else SEQUENCE
    return small_recipe(
        "long_text_8k",
        kind,
        about=f"long texts, {sequence:,} bytes at a time",
        parameters="0.3 M" if miniature else "5.2 M",
        shared=dict(rope_theta=ROTARY_BASE),
        miniature=miniature,
        data=(TRAINING,),
        seq_len=sequence,
        steps=3600,
    )


def long_text_16k(kind: str, *, miniature: bool = False) -> TrainingRecipe:
    """Return the recipe of an earlier round, of which one seed was measured, and of the ablations.

    Sequences have 16,384 tokens, those of the miniature 1,024. Embeddings start with a deviation of 0.02.
    """
    sequence = SEQUENCE_16K // 16 if miniature else SEQUENCE_16K
    return recipe_of_kind(
        "long_text",
        kind,
        about=f"long texts, {sequence:,} bytes at a time",
        parameters="0.3 M" if miniature else "13.3 M",
        sizes=dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1024, num_heads=12),
        shared=dict(rope_theta=ROTARY_BASE),
        miniature=miniature,
        data=(TRAINING,),
        seq_len=sequence,
        batch_tokens=65_536,
        steps=6000,  # the whole text twice
        warmup_steps=150,
        eval_every=600,
        save_every=600,
    )
