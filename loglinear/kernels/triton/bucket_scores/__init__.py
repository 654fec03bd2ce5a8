"""score(t, b) = q_t^T M_b q_t - n_b / K, with q and k of length 1: the scores of buckets.

The sums M_b are states of the scalar gate without decay and with the keys as values. So the sweeps, the gradients of
states and the final blocks are stages of `scalar_gate`. The stages at both ends are here:

forward.py:  chunk_sums, sweep (up), read, final_blocks.
backward.py: read_backward, state_backward, sweep (down), keys_backward.
operator.py: both directions as torch sees them.
step.py:     one token of every row.

A sum is stored without its mean for random keys, M_b - n_b / K I. It is about sqrt(n_b) times smaller than the sum, and
so is its rounding to 16 bits. Raw q and k enter every product as they come; their lengths are factors in float32.
"""

from loglinear.kernels.triton.bucket_scores.operator import bucket_scores
from loglinear.kernels.triton.bucket_scores.step import step

__all__ = ["bucket_scores", "step"]
