"""Memorisation: six kinds of model in five sizes, each on uniformly random tokens around its predicted capacity."""

from collections.abc import Mapping
from typing import Any

from experiments.random_tokens import RandomTokens
from experiments.recipes.comparison import EMBEDDINGS, parameters_of, widened
from loglinear.fenwick import num_levels
from loglinear.partition import Partition
from loglinear.recipes.bytes import BYTE_VOCABULARY, byte_model
from loglinear.recipes.recipe import DTYPES, TrainingRecipe

LENGTH, VOCABULARY = 64, 2048  # tokens of a sequence and different tokens, as published
BATCH = 2048  # sequences of a step, or all if there are fewer, as published
PREDICTED = 3.6  # bits of capacity a parameter, as published: what the loads are relative to
LOADS = (0.5, 1.0, 2.0, 4.0)  # bits of the dataset over the predicted capacity
# Width of the residual stream by the parameters of the model, tied embeddings included. The miniature has half of it.
SIZES = {"100k": 32, "270k": 64, "500k": 96, "1100k": 160, "2000k": 224}
LAYERS = 2
HEAD = 32  # numbers of a key and of a value
SMALL_BLOCKS = Partition(radix=4, finest_block=4)  # a token of the routed read sees up to seven buckets
STEPS, MINIATURE_STEPS = 5_000, 300
RATE = 0.3  # learning rate times the width; not searched
DELTA = {"variant": "gated_delta_net", "num_groups": None}  # queries and keys of their own for each head, as published


def model_changes(tokens: int, layers: int) -> dict[str, dict[str, Any]]:
    """Return the difference of each kind from the log-linear Mamba-2, for sequences of `tokens` tokens."""
    return {
        "transformer": {"layer_types": ["full_attention"] * layers},
        "linear": {"num_levels": 1},
        "log_linear": {},
        "routed": {
            "routing": "gram",
            "radix": SMALL_BLOCKS.radix,
            "finest_block": SMALL_BLOCKS.finest_block,
            "num_levels": SMALL_BLOCKS.num_columns(tokens),
        },
        "gated_delta_net": {**DELTA, "num_levels": 1},
        "log_linear_gated_delta_net": DELTA,
    }


KINDS = tuple(model_changes(LENGTH + 1, LAYERS))


def capacity(kind: str, size: str, load: float, *, dtype: str = "float32", miniature: bool = False) -> TrainingRecipe:
    """Return the recipe of one of KINDS, SIZES, LOADS and DTYPES; the dataset has LOAD times the predicted bits.

    All kinds of one size read equally many sequences. They have equally many parameters, as far as the steps of the
    SwiGLU layers' width allow. The miniature has one layer of half the width, sequences of 16 tokens and the least
    vocabulary that the byte tokenizer of every run allows. Raises ValueError for any other kind, size, load or dtype.
    """
    choices = (("kind", kind, KINDS), ("size", size, SIZES), ("load", load, LOADS), ("dtype", dtype, DTYPES))
    for name, value, allowed in choices:
        if value not in allowed:  # type: ignore[operator]
            raise ValueError(f"--{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    length, vocabulary = (16, BYTE_VOCABULARY) if miniature else (LENGTH, VOCABULARY)
    hidden, layers = (SIZES[size] // 2, 1) if miniature else (SIZES[size], LAYERS)
    base = small_model(hidden, layers, length + 1, vocabulary)
    parameters = parameters_of(base)
    sequence = RandomTokens(1, length, vocabulary)
    data = sequence._replace(sequences=round(load * PREDICTED * parameters / sequence.bits))
    steps = MINIATURE_STEPS if miniature else STEPS
    return TrainingRecipe(
        name=f"capacity_{kind}_{size}_{load:g}_{dtype}{'_miniature' * miniature}",
        summary=f"{parameters:,} parameters, {data.sequences:,} random sequences: {kind.replace('_', '-')}",
        model=widened({**base, **model_changes(length + 1, layers)[kind]}, parameters),
        data=(data.source,),
        seq_len=length + 1,
        batch_tokens=min(BATCH, data.sequences) * (length + 1),
        steps=steps,
        learning_rate=RATE / hidden,
        warmup_steps=steps // 50,
        final_lr_ratio=0.01,
        weight_decay=0.0,  # it would make the model forget
        eval_every=steps // 4,
        eval_tokens=1_048_576,  # more than all held-out sequences have
        save_every=steps // 4,
        keep_checkpoints=1,
        dtype=dtype,
    )


def small_model(hidden: int, layers: int, tokens: int, vocabulary: int) -> Mapping[str, Any]:
    """Return arguments of LogLinearConfig for a small log-linear Mamba-2, which every other kind changes."""
    return byte_model(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=3 * hidden,
        num_levels=num_levels(tokens),
        num_heads=2 * hidden // HEAD,  # of a mixer, whose values are twice as wide as the residual stream
        key_dim=HEAD,
        head_dim=HEAD,
        embedding_range=EMBEDDINGS,
        num_attention_heads=max(1, hidden // HEAD),
        attention_head_dim=HEAD,
    )
