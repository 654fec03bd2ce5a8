"""Candidates for the read of the buckets, compared on multi-query associative recall.

    w[t, b] = n_t softmax_b(W x_t + tau score(t, b)),    o_t = sum_b w[t, b] q_t^T S_t^(b)

A `Read` names a candidate: a partition of the past, a score and a form of the weights. `RoutedMixer` computes it in
plain torch.
"""

from experiments.reads.mixer import RoutedMixer, adapt
from experiments.reads.read import SCORES, Read

__all__ = ["SCORES", "Read", "RoutedMixer", "adapt"]
