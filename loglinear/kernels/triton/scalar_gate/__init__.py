"""S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, in chunks; the transition of a block is one number per head.

Forward:   chunk_state, sweep (up), output, final_blocks.
Backward:  walk_backward, in_chunk_backward, state_backward, sweep (down), chunk_state_backward, decay_backward.
One token: step.
"""

from loglinear.kernels.triton.scalar_gate.launch import ScalarGate, gradients
from loglinear.kernels.triton.scalar_gate.step import step_kernel

__all__ = ["ScalarGate", "gradients", "step_kernel"]
