"""S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, in chunks; the transition of a block is one number per head.

forward.py:  chunk_state, sweep (up), output, final_blocks.
backward.py: in_chunk_backward, walk_backward, state_backward, sweep (down), chunk_state_backward, decay_backward.
step.py:     one token.
"""

from loglinear.kernels.triton.scalar_gate.backward import gradients
from loglinear.kernels.triton.scalar_gate.forward import forward, forward_slabs, inputs_of, plan_of
from loglinear.kernels.triton.scalar_gate.step import step_kernel

__all__ = ["forward", "forward_slabs", "gradients", "inputs_of", "plan_of", "step_kernel"]
