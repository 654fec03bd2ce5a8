"""Retrieval from long text at the byte level: five models of 10.7 M parameters, for `loglinear eval needle`."""

from loglinear.recipes.bytes import BYTE_VOCABULARY
from loglinear.recipes.comparison import model_of_kind
from loglinear.recipes.recipe import TrainingRecipe

LEVELS = 15  # of 16,384 tokens
CAPPED_LEVELS = 12  # what is 1,024 tokens or more away shares the last


def needle(kind: str) -> TrainingRecipe:
    """One of `comparison.KINDS`, on documents of needles in noise and in Python's standard library, and on its files.

    4,096 tokens at a time; 90 M tokens, each once.
    """
    base = {
        "vocab_size": BYTE_VOCABULARY,
        "hidden_size": 320,
        "num_hidden_layers": 8,
        "intermediate_size": 640,
        "variant": "mamba2",
        "num_levels": LEVELS,
        "num_heads": 10,
        "num_groups": 1,
        "key_dim": 64,
        "head_dim": 64,
        "chunk_size": 64,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    }
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
