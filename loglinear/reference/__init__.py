"""The definitions, slow and obvious: the tests compare every other implementation with them."""

from loglinear.reference.chunked import chunked_scalar_gate
from loglinear.reference.dense import dense_delta_rule, dense_scalar_gate
from loglinear.reference.recurrent import level_states_from_blocks, recurrent

__all__ = ["chunked_scalar_gate", "dense_delta_rule", "dense_scalar_gate", "level_states_from_blocks", "recurrent"]
