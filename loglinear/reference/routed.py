"""The routed read, in O(T^2) definitions: each token weights a bucket by what the bucket holds.

    score(t, b) = sum over the tokens s of bucket b of ((q_t . k_s)^2 - 1 / K)    q, k of length 1; 0 for column 0
                = q_t^T M_b q_t - n_b / K,    M_b = sum_s k_s k_s^T,    n_b the tokens of the bucket
    a[t, b]     = logits[t, b] + sharpness * score(t, b)
    w[t, b]     = n_t softmax_b a[t, b]    over the n_t buckets that hold a token
    o_t         = sum_b w[t, b] q_t^T S_t^(b)

For random keys of length 1 the mean of (q . k)^2 is 1 / K. So a bucket scores about 0 if its keys are unrelated to the
query, however many there are. Each key that equals the query adds about 1. Column 0, the token's own finest block, has
the score 0. If all a are equal, every weight is 1: this is the linear model.

A sequence may start at a position p of the tree, `start`. Its tokens alone count. A bucket that ends before p is empty,
and the bucket around p has the tokens from p on.

A decode step may read few buckets. With top_k = k it sets the weights of all but the k largest to 0, besides column 0,
and keeps the others as they are.
"""

# T time, G groups, H heads, K key, V value, L columns; one sequence, heads first.
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.partition import FENWICK, Partition
from loglinear.reference.dense import dense_delta_rule, dense_scalar_gate, index_matrix_TT


def dense_tokens_TL(length: int, num_columns: int, partition: Partition = FENWICK, start: int = 0) -> Tensor:
    """Return n_b, the number of tokens in every bucket as each token sees it, its own included.

    Examples:
        >>> dense_tokens_TL(11, 3, Partition(radix=4, finest_block=2))[[0, 3, 10]].tolist()
        [[1, 0, 0], [2, 2, 0], [1, 2, 8]]
        >>> dense_tokens_TL(8, 3, Partition(radix=4, finest_block=2), start=3)[[0, 1, 7]].tolist()
        [[1, 0, 0], [1, 1, 0], [1, 2, 5]]
    """
    causal = torch.ones(length, length, dtype=torch.int64).tril()
    return torch.zeros(length, num_columns, dtype=torch.int64).scatter_add(
        1, index_matrix_TT(length, num_columns, partition, start), causal
    )


def dense_bucket_scores(
    q: Tensor,
    k: Tensor,
    num_columns: int,
    partition: Partition = FENWICK,
    start: int = 0,
    key_weights: Tensor | None = None,
) -> Tensor:
    """Return the scores [G, T, L] of q, k [G, T, K] of length 1, token by token; each key counts key_weights [G, T]."""
    G, T, K = q.shape
    matches = ((q @ k.mT).square() - 1 / K).tril()
    if key_weights is not None:
        matches = matches * key_weights[:, None]
    index_TT = index_matrix_TT(T, num_columns, partition, start).to(q.device)
    sums = q.new_zeros(G, T, num_columns).scatter_add(2, index_TT.expand(G, T, T), matches)
    return torch.cat([torch.zeros_like(sums[..., :1]), sums[..., 1:]], -1)


def dense_routed_weights(
    logits: Tensor, scores: Tensor, sharpness: Tensor, partition: Partition = FENWICK, start: int = 0
) -> Tensor:
    """Return w [H, T, L] from logits [H, T, L], scores [G, T, L] and sharpness [H].

    Examples:
        >>> dense_routed_weights(torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), torch.ones(1)).tolist()
        [[[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]]
    """
    H, T, L = logits.shape
    a = logits + sharpness[:, None, None] * scores.repeat_interleave(H // len(scores), 0)
    live = (dense_tokens_TL(T, L, partition, start) > 0).to(a.device)
    return a.masked_fill(~live, -torch.inf).softmax(-1) * live.sum(-1, keepdim=True)


def dense_top_k(weights: Tensor, top_k: int) -> Tensor:
    """Return the weights [..., L] with 0 in all but column 0 and the top_k largest others. The nearer wins a tie.

    Examples:
        >>> dense_top_k(torch.tensor([[0.1, 2.0, 0.5, 1.0, 2.0], [3.0, 1.0, 0.0, 1.0, 1.0]]), 2).tolist()
        [[0.10000000149011612, 2.0, 0.0, 0.0, 2.0], [3.0, 1.0, 0.0, 1.0, 0.0]]
    """
    kept = []
    for row in weights.flatten(0, -2).tolist():
        by_weight = sorted(range(1, len(row)), key=lambda b: -row[b])  # stable: equal ones stay in their order
        kept.append([b in (0, *by_weight[:top_k]) for b in range(len(row))])
    return torch.where(torch.tensor(kept, device=weights.device).view_as(weights), weights, 0.0)


def dense_routed_read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    logits: Tensor,
    sharpness: Tensor,
    partition: Partition = FENWICK,
    top_k: int | None = None,
    start: int = 0,
) -> Tensor:
    """Return the outputs [H, T, V] of the routed read: by the delta rule with beta, by a scalar gate if beta is None.

    The shapes are those of `dense_delta_rule`, with logits [H, T, L] and sharpness [H]. The scores scale q and k to
    length 1, x / sqrt(|x|^2 + 1e-6). The read takes q and k as they are. With top_k every token reads as a decode step.
    The first token is at position `start`.
    """
    unit_q, unit_k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    scores = dense_bucket_scores(unit_q, unit_k, logits.shape[2], partition, start)
    weights = dense_routed_weights(logits, scores, sharpness, partition, start)
    if top_k is not None:
        weights = dense_top_k(weights, top_k)
    if beta is None:
        return dense_scalar_gate(q, k, v, log_decay, weights, partition, start)
    return dense_delta_rule(q, k, v, log_decay, beta, weights, partition, start)
