"""Language modelling of long texts at the byte level: five models of 13.3 M parameters, see `experiments.long_text`."""

from loglinear.fenwick import num_levels
from loglinear.recipes.bytes import byte_model
from loglinear.recipes.comparison import model_of_kind
from loglinear.recipes.recipe import TrainingRecipe

SEQUENCE = 16_384
CAPPED_LEVELS = 13  # what is 2,048 tokens or more away shares the last


def long_text(kind: str) -> TrainingRecipe:
    """One of `comparison.KINDS`, on documents of 64 KiB to 1 MiB: sources and manuals, 16,384 tokens at a time."""
    base = byte_model(
        hidden_size=384,
        num_hidden_layers=6,
        intermediate_size=1024,
        num_levels=num_levels(SEQUENCE),
        num_heads=12,
        rope_theta=500_000.0,
    )
    return TrainingRecipe(
        name=f"long_text_{kind}",
        summary=f"13.3 M parameters, long texts, 16,384 bytes at a time: {kind.replace('_', '-')}",
        model=model_of_kind(kind, base, capped_levels=CAPPED_LEVELS),
        data=("data/long_text/train.jsonl.zst",),
        seq_len=SEQUENCE,
        batch_tokens=131_072,
        micro_batch_tokens=65_536,
        steps=2000,
        learning_rate=2e-3,
        warmup_steps=100,
        eval_every=200,
        eval_tokens=1_048_576,
        save_every=200,
        validation_fraction=0.02,
    )
