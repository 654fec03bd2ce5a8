"""The decays inside each chunk, put into its queries, keys and scores: no later stage knows of them.

    Q' = Q * exp(G)      K' = K * exp(Gam - G)      A[i, j] = sum_c q_ic k_jc exp(G_ic - G_jc) for j <= i

G [C, K] is the cumulative log decay inside the chunk, Gam [K] its last row (decays.py).
"""

# C chunk, G groups, H heads, K key
import triton
import triton.language as tl

from loglinear.kernels.triton.args import SIZES, Rows, Sizes
from loglinear.kernels.triton.diagonal_gate.decays import (
    after,
    are_pairs,
    is_own,
    load_gates,
    not_after,
    sums,
    to_middle,
)
from loglinear.kernels.triton.diagonal_gate.states import Decayed, Inputs
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.tiles import head_program, load_rows, locate, rows_at, store_rows


@launcher
@triton.jit(do_not_specialize=SIZES)
def decayed_rows_kernel(
    q,
    k,
    log_decay,
    decayed,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    K: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk, one head; tiles of the channels one after the other."""
    sizes = Sizes(T, N, H, R, L, cap)
    _, h, c = head_program(1, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    n = chunk.n
    if n <= 0:
        return
    row, i = chunk.c * sizes.H + h, tl.arange(0, C)
    q_rows, k_rows = rows_at(q, chunk, h // sizes.R), rows_at(k, chunk, h // sizes.R)
    g_rows, to_q, to_k = rows_at(log_decay, chunk, h), rows_at(decayed.q, chunk, h), rows_at(decayed.k, chunk, h)
    scores_CC = tl.zeros([C, C], tl.float32)
    for first in range(0, K, BK):
        g_CB = load_gates(g_rows, log_decay.t, n, first, C, K, BK)
        q_CB = load_rows(q_rows, q.t, n, first, C, K, BK).to(tl.float32)
        k_CB = load_rows(k_rows, k.t, n, first, C, K, BK).to(tl.float32)
        scores_CC += tl.where(is_own(C), tl.sum(q_CB * k_CB, 1)[:, None], 0.0)
        for level in range(LEVELS):
            decay_CB = tl.exp2(sums(to_middle(level, C), g_CB, MATH))
            right_CB, left_CB = (q_CB * decay_CB).to(MATH.dot), (k_CB * decay_CB).to(MATH.dot)
            pairs_CC = tl.dot(right_CB, tl.trans(left_CB), input_precision=MATH.precision)
            scores_CC += tl.where(are_pairs(level, C), pairs_CC, 0.0)
        from_start_CB = tl.exp2(sums(not_after(C), g_CB, MATH))
        store_rows(to_q, decayed.q.t, n, first, q_CB * from_start_CB, C, K, BK)
        to_end_CB = tl.exp2(sums(after(C), g_CB, MATH))
        store_rows(to_k, decayed.k.t, n, first, k_CB * to_end_CB, C, K, BK)
        channel = first + tl.arange(0, BK)
        tl.store(decayed.totals + row * K + channel, tl.sum(g_CB, 0), mask=channel < K)
    tl.store(decayed.scores + row * (C * C) + (i[:, None] * C + i[None, :]), scores_CC)


def decayed_rows(x: Inputs, launch: Launch) -> Decayed:
    """All heads' queries and keys, their scores, and the totals of the lowest tier."""
    y, H, C, shape = x.layout, x.heads, x.chunk_size, (*x.v.data.shape[:3], x.key_dim)
    q, k = (Rows.of(x.empty(*shape, dtype=x.dtype)) for _ in range(2))
    decayed = Decayed(q, k, x.empty(y.chunks, H, C, C), x.empty(len(y.runs) + 1, y.chunks, H, x.key_dim))
    decayed_rows_kernel[(y.chunks * H,)](
        x.q, x.k, x.log_decay, decayed, y.table, *x.sizes, **x.channel_constants(launch)
    )
    return decayed
