"""The decays inside each chunk, put into its queries, keys and scores: no later stage knows of them.

    Q' = Q * exp(G)      K' = K * exp(Gam - G)      A[i, j] = sum_c q_ic k_jc exp(G_ic - G_jc) for j <= i

and for the delta rule K * exp(G), and the same products of keys for j < i. G [C, K] is the cumulative log decay inside
the chunk, Gam [K] its last row (decays.py).
"""

# C chunk, G groups, H heads, K key
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Math, Rows, Sizes
from loglinear.kernels.triton.diagonal_gate.decays import (
    after,
    are_pairs,
    is_own,
    load_gates,
    not_after,
    sums,
    to_middle,
)
from loglinear.kernels.triton.diagonal_gate.states import Decayed, channel_constants
from loglinear.kernels.triton.inputs import Inputs
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
    scale,
    K: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk, one head; tiles of the channels one after the other. Queries and scores are multiplied by scale."""
    sizes = Sizes(T, N, H, R, L, cap)
    _, h, c = head_program(1, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    n = chunk.n
    if n <= 0:
        return
    row, i = chunk.c * sizes.H + h, tl.arange(0, C)
    q_rows, k_rows = rows_at(q, chunk, h // sizes.R), rows_at(k, chunk, h // sizes.R)
    g_rows, to_q, to_k = rows_at(log_decay, chunk, h), rows_at(decayed.q, chunk, h), rows_at(decayed.k, chunk, h)
    scores_CC, products_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for first in range(0, K, BK):
        g_CB = load_gates(g_rows, log_decay.t, n, first, C, K, BK)
        q_CB = load_rows(q_rows, q.t, n, first, C, K, BK).to(tl.float32) * scale
        k_CB = load_rows(k_rows, k.t, n, first, C, K, BK).to(tl.float32)
        scores_CC += tl.where(is_own(C), tl.sum(q_CB * k_CB, 1)[:, None], 0.0)
        for level in range(LEVELS):
            decay_CB = tl.exp2(sums(to_middle(level, C), g_CB, MATH))
            right_CB, left_CB = (q_CB * decay_CB).to(MATH.dot), (k_CB * decay_CB).to(MATH.dot)
            pairs_CC = tl.dot(right_CB, tl.trans(left_CB), input_precision=MATH.precision)
            scores_CC += tl.where(are_pairs(level, C), pairs_CC, 0.0)
            if decayed.products is not None:
                pairs_CC = tl.dot(left_CB, tl.trans(left_CB), input_precision=MATH.precision)
                products_CC += tl.where(are_pairs(level, C), pairs_CC, 0.0)
        from_start_CB = tl.exp2(sums(not_after(C), g_CB, MATH))
        store_rows(to_q, decayed.q.t, n, first, q_CB * from_start_CB, C, K, BK)
        if decayed.seen is not None:
            store_rows(rows_at(decayed.seen, chunk, h), decayed.seen.t, n, first, k_CB * from_start_CB, C, K, BK)
        to_end_CB = tl.exp2(sums(after(C), g_CB, MATH))
        store_rows(to_k, decayed.k.t, n, first, k_CB * to_end_CB, C, K, BK)
        channel = first + tl.arange(0, BK)
        tl.store(decayed.totals + row * K + channel, tl.sum(g_CB, 0), mask=channel < K)
    tile_CC = row * (C * C) + (i[:, None] * C + i[None, :])
    tl.store(decayed.scores + tile_CC, scores_CC)
    if decayed.products is not None:
        tl.store(decayed.products + tile_CC, products_CC)


def room(x: Inputs, totals: Tensor, *, delta: bool) -> Decayed:
    """Return arrays for all heads' queries and keys and for their products, those of the `delta` rule too."""
    shape, pairs = (*x.v.data.shape[:3], x.key_dim), (x.layout.chunks, x.heads, x.chunk_size, x.chunk_size)
    q, k = (Rows.of(x.empty(*shape, dtype=x.dtype)) for _ in range(2))
    decayed = Decayed(q, k, x.empty(*pairs), totals)
    if not delta:
        return decayed
    return decayed._replace(seen=Rows.of(x.empty(*shape, dtype=x.dtype)), products=x.empty(*pairs))


def decayed_rows(x: Inputs, decayed: Decayed, scale: float, math: Math, launch: Launch) -> Decayed:
    """Fill `decayed`, and return it."""
    decayed_rows_kernel[(x.layout.chunks * x.heads,)](
        x.q,
        x.k,
        x.log_decay,
        decayed,
        x.layout.table,
        *x.sizes,
        scale,
        MATH=math,
        **channel_constants(x, launch),
    )
    return decayed
