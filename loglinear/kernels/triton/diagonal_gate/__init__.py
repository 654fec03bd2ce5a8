"""S_t = Diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, in chunks; the transition of a block is one number per key channel.

forward.py:  decayed_rows, chunk_state, sweep (up), output, final_blocks.
backward.py: scores_backward, walk_backward, state_backward, sweep (down), writes_backward, decayed_rows_backward.

The first stage puts the decays inside chunks into queries, keys and scores. The stages on states are the scalar gate's:
for the sweeps each row of a state is a head of its own, with its own decay.
"""

from loglinear.kernels.triton.diagonal_gate.backward import gradients
from loglinear.kernels.triton.diagonal_gate.forward import forward, forward_slabs, inputs_of, plan_of

__all__ = ["forward", "forward_slabs", "gradients", "inputs_of", "plan_of"]
