"""Language modelling of long texts at the byte level: five models of 13.3 M parameters, see `experiments.long_text`."""

from typing import Any

from loglinear.fenwick import num_levels
from loglinear.recipes.bytes import byte_model
from loglinear.recipes.comparison import MINIATURE_MODEL, MINIATURE_TRAINING, model_of_kind
from loglinear.recipes.recipe import TrainingRecipe

SEQUENCE = 16_384
CAPPED_BY = 2  # levels: what is an eighth of a sequence or more away shares the last
MODEL = dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1024, num_heads=12)
TRAINING = dict(
    batch_tokens=131_072,
    micro_batch_tokens=65_536,
    steps=1500,  # nearly the whole text, once
    warmup_steps=75,
    eval_every=150,
    eval_tokens=1_048_576,
    save_every=150,
)


def long_text(kind: str, *, miniature: bool = False) -> TrainingRecipe:
    """One of `comparison.KINDS`, on documents of 64 KiB to 1 MiB: sources and manuals, 16,384 tokens at a time (in
    miniature 1,024)."""
    sequence = SEQUENCE // 16 if miniature else SEQUENCE
    size, sizes = ("0.3 M", MINIATURE_MODEL) if miniature else ("13.3 M", MODEL)
    levels = num_levels(sequence)
    base = byte_model(num_levels=levels, rope_theta=500_000.0, **sizes)
    training: dict[str, Any] = {**TRAINING, **(MINIATURE_TRAINING if miniature else {})}
    return TrainingRecipe(
        name=f"long_text_{kind}{'_miniature' * miniature}",
        summary=f"{size} parameters, long texts, {sequence:,} bytes at a time: {kind.replace('_', '-')}",
        model=model_of_kind(kind, base, capped_levels=levels - CAPPED_BY),
        data=("data/long_text/train.jsonl.zst",),
        seq_len=sequence,
        learning_rate=2e-3,
        validation_fraction=0.02,
        **training,
    )
