"""Byte-level recipes: `demo` for a CPU, `small` for one GPU."""

from typing import Any

from loglinear.recipes.recipe import TrainingRecipe

BYTE_VOCABULARY = 264  # 256 bytes, bos, eos and pad, padded to a multiple of 8


def byte_model(**sizes: Any) -> dict[str, Any]:
    """Return arguments of LogLinearConfig for a byte-level Mamba-2 with heads of 64 and the given sizes."""
    shared = dict(vocab_size=BYTE_VOCABULARY, variant="mamba2", num_groups=1, key_dim=64, head_dim=64, chunk_size=64)
    shared["loss_chunk_size"] = 16_384  # 17 MB of logits: this small vocabulary allows long slices
    return {**shared, "lambda_form": "unit", "tie_word_embeddings": True, **sizes}


def demo() -> TrainingRecipe:
    """Return the recipe of the demo: 1.0 M parameters on Python's standard library, minutes on two CPU cores."""
    return TrainingRecipe(
        name="demo",
        summary="1.0 M parameters, bytes of Python's standard library, minutes on two CPU cores",
        model=byte_model(
            hidden_size=192,
            num_hidden_layers=2,
            intermediate_size=512,
            num_levels=12,
            num_heads=4,
        ),
        data=("stdlib",),
        seq_len=2048,
        batch_tokens=4096,
        steps=240,
        learning_rate=3e-3,
        warmup_steps=20,
        eval_every=60,
        eval_tokens=65_536,
        save_every=120,
        validation_fraction=0.1,
    )


def small() -> TrainingRecipe:
    """Return a recipe of 26 M parameters at the byte level: an evening on one GPU."""
    return TrainingRecipe(
        name="small",
        summary="26 M parameters, bytes, an evening on one GPU",
        model=byte_model(
            hidden_size=384,
            num_hidden_layers=12,
            intermediate_size=1024,
            num_levels=14,
            num_heads=12,
        ),
        seq_len=8192,
        batch_tokens=131_072,
        micro_batch_tokens=32_768,
        steps=10_000,
        learning_rate=1e-3,
        warmup_steps=500,
        eval_every=500,
        eval_tokens=1_048_576,
        save_every=1000,
    )
