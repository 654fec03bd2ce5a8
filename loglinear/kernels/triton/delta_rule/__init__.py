"""S_t = exp(log_decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, in chunks; the transition of a block is a
K x K matrix.

forward.py:  chunk_inverse, chunk_state, run_scan, carry_in, output, final_blocks.
backward.py: in_chunk, walk_backward, state_backward, carry_in_backward, run_scan_backward, scores_backward,
             writes_backward, lower_backward, keys_backward, decay_backward.
step.py:     one token.
"""

from loglinear.kernels.triton.delta_rule.backward import gradients
from loglinear.kernels.triton.delta_rule.forward import forward, forward_slabs, inputs_of, plan_of
from loglinear.kernels.triton.delta_rule.layout import count_chunks
from loglinear.kernels.triton.delta_rule.products import choose_chunk_size, products_of, state_dtype
from loglinear.kernels.triton.delta_rule.step import step_kernel

__all__ = [
    "choose_chunk_size",
    "count_chunks",
    "forward",
    "forward_slabs",
    "gradients",
    "inputs_of",
    "plan_of",
    "products_of",
    "state_dtype",
    "step_kernel",
]
