"""The definitions, slow and obvious: the tests compare every other implementation with them."""

from loglinear.reference.chunked import chunked_scalar_gate
from loglinear.reference.dense import dense_delta_rule, dense_scalar_gate
from loglinear.reference.recurrent import recurrent, states_from_blocks

__all__ = ["chunked_scalar_gate", "dense_delta_rule", "dense_scalar_gate", "recurrent", "states_from_blocks"]
