"""The mathematics, slow and obvious: what every other implementation is checked against."""

from loglinear.reference.chunked import chunked_scalar_gate
from loglinear.reference.dense import dense_delta_rule, dense_scalar_gate
from loglinear.reference.recurrent import level_states_from_blocks, recurrent

__all__ = ["chunked_scalar_gate", "dense_delta_rule", "dense_scalar_gate", "level_states_from_blocks", "recurrent"]
