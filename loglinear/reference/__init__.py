"""The definitions, slow and obvious: the tests compare every other implementation with them."""

from loglinear.reference.chunked import chunked_scalar_gate
from loglinear.reference.dense import dense_delta_rule, dense_scalar_gate
from loglinear.reference.recurrent import recurrent, states_from_blocks
from loglinear.reference.routed import (
    dense_bucket_scores,
    dense_routed_read,
    dense_routed_weights,
    dense_tokens_TL,
    dense_top_k,
)

__all__ = [
    "chunked_scalar_gate",
    "dense_bucket_scores",
    "dense_delta_rule",
    "dense_routed_read",
    "dense_routed_weights",
    "dense_scalar_gate",
    "dense_tokens_TL",
    "dense_top_k",
    "recurrent",
    "states_from_blocks",
]
