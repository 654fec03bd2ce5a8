"""S_t = exp(log_decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, in chunks; the transition of a block is a
K x K matrix.

Forward:   chunk_inverse, chunk_state, transport, carry, output.
Backward:  the same but the first and the last, in_chunk, walk_backward, state_backward, carry_backward,
transport_backward, scores_backward, keys_backward.
One token: step.
"""

from loglinear.kernels.triton.delta_rule.launch import DeltaRule, gradients
from loglinear.kernels.triton.delta_rule.layout import count_chunks
from loglinear.kernels.triton.delta_rule.products import choose_chunk_size, state_dtype
from loglinear.kernels.triton.delta_rule.step import step_kernel

__all__ = ["DeltaRule", "choose_chunk_size", "count_chunks", "gradients", "state_dtype", "step_kernel"]
