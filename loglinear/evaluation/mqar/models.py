"""The models of the recall table by name: sizes at a dimension, ablations, and controls with larger states.

A control is a linear model with more key dimensions, and learning rates of its own. MODEL_statesN has states N times as
large. MODEL_equal_bytes has at least the bytes of the published log-linear model of the same variant, and at most one
step of KEY_STEP key dimensions more.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from loglinear.partition import LARGEST_CHUNK
from loglinear.recipes.choices import PUBLISHED, choices
from loglinear.registry import pick

if TYPE_CHECKING:
    from loglinear.models import LogLinearConfig, LogLinearForCausalLM

LAYERS = 2
STATE_DIM = 16  # head dimension and key dimension of Mamba-2
CHUNK_SIZE = 16  # no result depends on it; it is fast on a CPU for such heads and short examples
KEY_STEP = 8  # step of the key dimension in which a control is widened


def _mamba2(dim: int) -> dict[str, Any]:
    """Return Mamba-2 with expansion 2 in heads of 16, one query/key group."""
    return dict(variant="mamba2", num_heads=2 * dim // STATE_DIM, num_groups=1, key_dim=STATE_DIM, head_dim=STATE_DIM)


def _gated_delta_net(dim: int) -> dict[str, Any]:
    """Return Gated DeltaNet with one head at dimension 16, otherwise two; values are twice as wide as keys."""
    heads = 1 if dim <= 16 else 2
    return dict(
        variant="gated_delta_net",
        num_heads=heads,
        num_groups=heads,
        key_dim=dim // heads,
        head_dim=2 * dim // heads,
    )


def _attention(dim: int) -> dict[str, Any]:
    """Return softmax attention with one head of the whole dimension and rotary positions."""
    return dict(layer_types=["full_attention"] * LAYERS, num_attention_heads=1, attention_head_dim=dim)


def _widened(sizes: Callable[[int], dict[str, Any]], times: int, dim: int) -> dict[str, Any]:
    """Return the sizes with `times` the key dimension."""
    narrow = sizes(dim)
    return {**narrow, "key_dim": times * narrow["key_dim"]}


class Model(NamedTuple):
    """The sizes for a dimension, and further fields of the configuration. num_levels defaults to all columns.

    If `bytes_of` names a model, the key dimension grows until the decode state has at least as many bytes as that
    model's. `adapt` changes a built model, for examples of up to so many tokens. `decode_bytes` returns the bytes of an
    adapted model's decode state from its configuration and a number of tokens, as the function of this name does for
    others. `takes_positions` is True for an adapted model whose tree starts at `initial_position`; others always do.
    """

    sizes: Callable[[int], dict[str, Any]]
    changes: dict[str, Any] = {}
    bytes_of: str | None = None
    adapt: Callable[[LogLinearForCausalLM, int], None] | None = None
    decode_bytes: Callable[[LogLinearConfig, int], int] | None = None
    takes_positions: bool = False


LINEAR = {"num_levels": 1}
ROUTED = {"radix": 16, "finest_block": CHUNK_SIZE, "routing": "gram"}
MODELS = {
    "mamba2": Model(_mamba2, LINEAR),
    "log_linear_mamba2": Model(_mamba2, PUBLISHED),
    "gated_delta_net": Model(_gated_delta_net, LINEAR),
    "log_linear_gated_delta_net": Model(_gated_delta_net, PUBLISHED),
    "attention": Model(_attention, LINEAR),
}
LINEAR_MODELS = ("mamba2", "gated_delta_net")
CHOICES = choices(capped_levels=6)  # tokens 16 positions away and farther share the last level
ABLATIONS = {
    f"{name}_{choice}": Model(MODELS[name].sizes, changes)
    for name in ("log_linear_mamba2", "log_linear_gated_delta_net")
    for choice, changes in CHOICES.items()
}
TIMES = (2, 4, 8, 16)
CONTROLS = {
    **{f"{name}_equal_bytes": MODELS[name]._replace(bytes_of=f"log_linear_{name}") for name in LINEAR_MODELS},
    **{
        f"{name}_states{times}": Model(partial(_widened, MODELS[name].sizes, times), LINEAR)
        for name in LINEAR_MODELS
        for times in TIMES
    },
}
ROUTED_MODELS = {f"routed_{name}": Model(MODELS[name].sizes, ROUTED) for name in LINEAR_MODELS}
ALL_MODELS = MODELS | ROUTED_MODELS | CONTROLS | ABLATIONS


def find_model(name: str) -> Model:
    """Return the model called `name`. Raises ValueError, with the nearest name, if there is none."""
    return pick("model", ALL_MODELS, name)


def model_config(name: str, dim: int, *, vocab_size: int, length: int, positions: int) -> LogLinearConfig:
    """Return the configuration of a model for examples of up to `length` tokens at positions below `positions`."""
    from loglinear.models import LogLinearConfig

    model = find_model(name)
    fields: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=dim,
        num_hidden_layers=LAYERS,
        intermediate_size=0,
        tie_word_embeddings=True,
        chunk_size=CHUNK_SIZE,
    )
    fields |= model.sizes(dim) | model.changes
    fields.setdefault("num_levels", LogLinearConfig(**fields).partition.num_columns(positions))
    if model.bytes_of is not None:
        other = model_config(model.bytes_of, dim, vocab_size=vocab_size, length=length, positions=positions)
        wanted = model_bytes(model.bytes_of, other, length)
        if wanted is None:
            raise ValueError(f"{name} needs the decode bytes of {model.bytes_of}, which are not known")
        wider = (LogLinearConfig(**{**fields, "key_dim": key}) for key in itertools.count(fields["key_dim"], KEY_STEP))
        return next(config for config in wider if decode_bytes(config, length) >= wanted)
    return LogLinearConfig(**fields)


def model_bytes(name: str, config: LogLinearConfig, tokens: int) -> int | None:
    """Return `decode_bytes` of a model with this configuration; None if an adapted model does not say."""
    model = find_model(name)
    if model.adapt is None or model.decode_bytes is not None:
        return (model.decode_bytes or decode_bytes)(config, tokens)
    return None


def decode_bytes(config: LogLinearConfig, tokens: int) -> int:
    """Return the bytes of the float32 decode state of one sequence of `tokens` tokens, in all layers.

    No result depends on the chunk size, but the state's size does. The chunk size with the smallest state counts, so
    a linear model pays for no buffer of tokens that it does not need. A full-attention layer has its KV cache.
    """
    import torch

    from loglinear.models import state_bytes

    sizes = []
    for exponent in range((min(tokens, LARGEST_CHUNK) - 1).bit_length() + 1):
        same = copy.copy(config)
        same.chunk_size = 1 << exponent
        sizes.append(state_bytes(same, tokens, torch.float32))
    return min(sizes)
