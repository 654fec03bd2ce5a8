"""S_t = exp(log_decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, in chunks; the transition of a block is a
K x K matrix.

Forward:   chunk_inverse, chunk_state, up_sweep, carry, output.
Backward:  the same but output, in_chunk, walk_backward, state_backward, carry_backward, down_sweep, in_chunk_backward.
"""

from loglinear.kernels.triton.delta_rule.launch import DeltaRule, choose_chunk_size, gradients

__all__ = ["DeltaRule", "choose_chunk_size", "gradients"]
