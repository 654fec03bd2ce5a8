"""Retrieval from long text: seven models of 6 M parameters, small enough for several seeds of each."""

from experiments.recipes.comparison import recipe_of_kind
from loglinear.recipes.recipe import TrainingRecipe

SEQUENCE = 2048  # tokens
LONGEST = 3 * SEQUENCE  # bytes of a document with needles, of which a token has 3.2
EMBEDDINGS = 0.08  # deviation of the first ones; with 0.02, as of the other weights, softmax attention learns late
VOCABULARY = 4096  # tokens; the long texts have bytes, but a key of eleven bytes is hard to recognise
RATES = {  # the least validation loss of seed 10 among 1e-3, 2e-3 and 4e-3: docs/results/needles.md
    "linear": 2e-3,
    "linear_states4": 4e-3,
    "log_linear": 4e-3,
    "capped": 4e-3,  # after 1,800 steps of the search; no result yet
    "routed": 4e-3,  # that of the log-linear models, not searched yet
    "hybrid": 4e-3,
    "transformer": 1e-3,
}
TOKENIZER = "data/needle/tokenizer"  # `python -m experiments.needle prepare` makes it


def needle(kind: str, *, miniature: bool = False) -> TrainingRecipe:
    """Return the recipe of one of `comparison.KINDS` on needles in noise and in Python's standard library.

    The files of the standard library are training text too. Sequences have 2,048 tokens; a run reads 98 M.
    """
    return recipe_of_kind(
        "needle",
        kind,
        about=f"needles in haystacks of {SEQUENCE:,} tokens",
        parameters="0.7 M" if miniature else "6 M",
        sizes=dict(hidden_size=256, num_hidden_layers=6, intermediate_size=512, num_heads=8),
        shared=dict(vocab_size=VOCABULARY, rope_theta=10_000.0, embedding_range=EMBEDDINGS),
        miniature=miniature,
        tokenizer=TOKENIZER,
        data=(f"needle:{6000 if miniature else 60_000}:{LONGEST}:stdlib", "stdlib"),
        seq_len=SEQUENCE,
        learning_rate=RATES[kind],
        batch_tokens=16_384,
        micro_batch_tokens=16_384,
        steps=6000,
        warmup_steps=200,
        eval_every=600,
        save_every=600,
    )
