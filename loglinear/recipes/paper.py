"""The 700 to 825 M models of the paper (Guo et al., arXiv 2506.04761, section 4 and its appendix).

Shared by all three: 21 layers, hidden size 1536, a vocabulary of 32,000, 50 B tokens of long documents in sequences of
16,384 and batches of 524,288 tokens, AdamW at 3e-4 with 1,024 steps of warmup, clipping at 1.0, initial weights of
standard deviation 0.006, and 15 levels. The recipes name no data and no tokenizer: give `--data` and `--tokenizer`.
"""

from typing import Any

from loglinear.recipes.recipe import TrainingRecipe

TOKENS = 50_000_000_000


def _paper(name: str, summary: str, **model: Any) -> TrainingRecipe:
    shared = {
        "vocab_size": 32_000,
        "hidden_size": 1536,
        "num_hidden_layers": 21,
        "intermediate_size": 4096,
        "num_levels": 15,
        "lambda_form": "softplus",
        "initializer_range": 0.006,
        "tie_word_embeddings": False,
    }
    batch_tokens = 524_288
    return TrainingRecipe(
        name=name,
        summary=summary,
        model={**shared, **model},
        tokenizer=None,
        seq_len=16_384,
        batch_tokens=batch_tokens,
        micro_batch_tokens=16_384,
        steps=TOKENS // batch_tokens,
        learning_rate=3e-4,
        warmup_steps=1024,
        eval_every=1000,
        eval_tokens=4_194_304,
        save_every=1000,
        validation_fraction=0.001,
    )


def paper_mamba2() -> TrainingRecipe:
    """Return Log-Linear Mamba-2: 48 heads of 64, state dimension 128, one query/key group."""
    return _paper(
        "paper_mamba2",
        "Log-Linear Mamba-2 of the paper, about 800 M parameters",
        variant="mamba2",
        num_heads=48,
        num_groups=1,
        key_dim=128,
        head_dim=64,
    )


def paper_gated_delta_net() -> TrainingRecipe:
    """Return Log-Linear Gated DeltaNet: 6 heads, key dimension 192, values twice as wide."""
    return _paper(
        "paper_gated_delta_net",
        "Log-Linear Gated DeltaNet of the paper, about 800 M parameters",
        variant="gated_delta_net",
        num_heads=6,
        num_groups=6,
        key_dim=192,
        head_dim=384,
    )


def paper_transformer() -> TrainingRecipe:
    """Return the softmax-attention baseline: 16 heads, RoPE base 500,000."""
    return _paper(
        "paper_transformer",
        "Transformer baseline of the paper, about 700 M parameters",
        layer_types=["full_attention"] * 21,
        num_attention_heads=16,
        num_key_value_heads=16,
        attention_head_dim=96,
        rope_theta=500_000.0,
    )
