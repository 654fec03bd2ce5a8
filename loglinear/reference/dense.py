"""The O(T^2) definition: a matrix of attention coefficients, weighted by level.

    scalar gate :  O = (Q K^T * M^S * M^H) V
    delta rule  :  O = (E * M^H) V,  E the coefficient of v_s in the output of the linear delta rule at t

M^S[t, s] = exp(G_t - G_s), with G the cumulative log decay, and M^H[t, s] = lambda[t, min(index(t, s), L - 1)]. Both
are lower triangular. A diagonal gate has an M^S for each channel c of the keys, inside the product: in place of
Q K^T * M^S stands sum_c q_tc k_sc exp(G_tc - G_sc). The partition of the past gives index(t, s);
radix 2 is the published level(t, s).

Source: arXiv 2506.04761, equations 4 to 8; arXiv 2312.06635 and 2510.26692 (diagonal gates).
"""

# T time, H heads, K key, V value, L levels; one sequence, one tensor layout: heads first.
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.partition import FENWICK, Partition


def index_matrix_TT(length: int, num_columns: int, partition: Partition = FENWICK, start: int = 0) -> Tensor:
    """Return ``min(index(t, s), num_columns - 1)`` for all s <= t, and 0 for the others; the first token is at `start`.

    Examples:
        >>> index_matrix_TT(4, 3).tolist()
        [[0, 0, 0, 0], [1, 0, 0, 0], [2, 2, 0, 0], [2, 2, 1, 0]]
        >>> index_matrix_TT(4, 3, start=3).tolist()
        [[0, 0, 0, 0], [2, 0, 0, 0], [2, 1, 0, 0], [2, 2, 2, 0]]
    """
    positions = range(start, start + length)
    rows = [[min(partition.index(t, min(s, t)), num_columns - 1) for s in positions] for t in positions]
    return torch.tensor(rows).view(length, length)


def level_weights_HTT(level_scales_HTL: Tensor, partition: Partition = FENWICK, start: int = 0) -> Tensor:
    """Return M^H, the lower-triangular matrix of lambdas of a sequence whose first token is at `start`."""
    heads, length, columns = level_scales_HTL.shape
    index_TT = index_matrix_TT(length, columns, partition, start).to(level_scales_HTL.device)
    return level_scales_HTL.gather(2, index_TT.expand(heads, length, length)).tril()


def decay_HTT(log_decay_HT: Tensor) -> Tensor:
    """Return M^S, the decay from s (exclusive) to t (inclusive), summed over exactly those tokens."""
    length = log_decay_HT.shape[1]
    between_TTT = torch.ones(length, length, device=log_decay_HT.device).tril(-1)  # [m, s]: m > s
    steps = log_decay_HT[:, :, None] * between_TTT
    return steps.cumsum(1).exp().tril()


def decayed_products_HTT(q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """Return Q K^T * M^S of q, k [H, T, K]; log_decay is [H, T], or [H, T, K] for a diagonal gate."""
    if log_decay.dim() == 2:
        return q @ k.mT * decay_HTT(log_decay)
    channels = zip(q.unbind(2), k.unbind(2), log_decay.unbind(2), strict=True)
    return sum(q_HT[:, :, None] * k_HT[:, None, :] * decay_HTT(g_HT) for q_HT, k_HT, g_HT in channels)  # type: ignore[return-value]


def dense_scalar_gate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    level_scales: Tensor,
    partition: Partition = FENWICK,
    start: int = 0,
) -> Tensor:
    """Return the outputs [H, T, V] of a gate without the delta rule; `start` is the position of the first token.

    The shapes are q, k [H, T, K]; v [H, T, V]; log_decay [H, T], or [H, T, K] for a diagonal gate; level_scales
    [H, T, L].
    """
    return (decayed_products_HTT(q, k, log_decay) * level_weights_HTT(level_scales, partition, start)) @ v


def dense_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    level_scales: Tensor,
    partition: Partition = FENWICK,
    start: int = 0,
) -> Tensor:
    """Return the outputs [H, T, V] of the delta rule; arguments as in `dense_scalar_gate`, and beta [H, T].

    The output of the linear delta rule is linear in v: o = (Q K^T * M^S) u with
    u_t = b_t (v_t - k_t^T Diag(a_t) S_{t-1}). So (I + tril(diag(b) K K^T * M^S, -1)) u = diag(b) v, and
    E = (Q K^T * M^S) (I + ...)^-1 diag(b).
    """
    identity = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    erase = (beta[..., None] * decayed_products_HTT(k, k, log_decay)).tril(-1)
    # A solver for triangles: torch.linalg.inv of two matrices in two threads is wrong with torch 2.13 and oneMKL.
    products = decayed_products_HTT(q, k, log_decay)
    solved = torch.linalg.solve_triangular(identity + erase, products, upper=False, left=False)
    effective = solved * beta[:, None, :]
    return (effective * level_weights_HTT(level_scales, partition, start)) @ v
