"""Which read of the buckets remembers? Dense candidates, compared on multi-query associative recall.

    w[t, b] = n_t softmax_b(W x_t + tau score(t, b)),    o_t = sum_b w[t, b] q_t^T S_t^(b)

Every candidate is a `Read`: a partition of the past, a score, a form. `RoutedMixer` computes it as a T x T matrix.
"""

from experiments.reads.mixer import RoutedMixer, adapt
from experiments.reads.read import SCORES, Read

__all__ = ["SCORES", "Read", "RoutedMixer", "adapt"]
