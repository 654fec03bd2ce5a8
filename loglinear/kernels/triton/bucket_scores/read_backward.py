"""The scores, differentiated on the queries' side.

    dQ = 2 / |q|^2 (A - q (q . A) / |q|^2)        A = sum_l diag(w_l) Q M_l + (W * Q K^T / |k|^2) K

w are the gradients of the scores, and W[t, s] = w[t, column(t, s)] in the chunk.
"""

# C chunk, G groups, K key, L columns
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Sizes, Slab
from loglinear.kernels.triton.bucket_scores.inputs import Inputs
from loglinear.kernels.triton.bucket_scores.lengths import first_of, inverse_squares, shortfalls, tokens_from
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.levels import columns_between, gather_scales
from loglinear.kernels.triton.scalar_gate.states import States
from loglinear.kernels.triton.tiles import (
    head_program,
    load_rows,
    load_state,
    locate,
    part_of,
    rows_at,
    slab_at,
    store_rows,
)
from loglinear.kernels.triton.walks import after, candidate_at, height_of, slot_pointer, start_of_walk, walk


@triton.jit
def load_pairs(dscores, rows, n, L, i, ROWS: tl.constexpr, TREE: tl.constexpr):
    """W[i, j], 0 in column 0 and where j is not read."""
    weights_CC = gather_scales(rows, dscores.t, n, L, i, ROWS, TREE)
    return tl.where(columns_between(i, ROWS, TREE) > 0, weights_CC, 0.0)


@launcher
@triton.jit(do_not_specialize=SIZES)
def read_backward_kernel(
    q,
    k,
    dscores,
    states,
    dq,
    first,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    K: tl.constexpr,
    C: tl.constexpr,
    HALVES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    UNIT: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One half of a chunk, one group. Writes dq, and log2(1 / |q|^2) as states.cumulative. With several tiles A is
    computed twice: first for q . A. 1 / |q|^2 is the factor of `dscores` in the gradients of the sums."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (K + BV - 1) // BV
    TURNS: tl.constexpr = 1 if TILES == 1 else 2 * TILES
    ROWS: tl.constexpr = C // HALVES
    COLUMNS: tl.constexpr = TREE.column
    _, h, part = head_program(1, sizes.H)
    half = part % HALVES
    chunk = part_of(locate((part // HALVES).to(tl.int64), table, sizes, C), half, ROWS)
    n = chunk.n
    if n <= 0:
        return
    i, w_rows = tl.arange(0, ROWS), rows_at(dscores, chunk, h)
    q_rows, k_rows = rows_at(q, chunk, h), rows_at(k, chunk, h)
    q_CK = load_rows(q_rows, q.t, n, 0, ROWS, K, BK)
    inverse = inverse_squares(q_CK, UNIT)
    shortfall = shortfalls(q_CK, inverse, UNIT)
    tl.store(states.cumulative + (chunk.c * sizes.H + h) * C + half * ROWS + i, tl.log2(inverse))
    q_CK = q_CK.to(MATH.dot)
    if COLUMNS > 1:
        k_CK = load_rows(k_rows, k.t, n, 0, ROWS, K, BK)
        pulled_CC = tl.dot(q_CK, tl.trans(k_CK.to(MATH.dot)), input_precision=MATH.precision)
        pulled_CC *= load_pairs(dscores, w_rows, n, L, i, ROWS, TREE) * inverse_squares(k_CK, UNIT)[None, :]
    read, end_of_blocks, are_initial = walk(chunk, cap, TREE)
    start, count = start_of_walk(read, chunk, TREE), tl.sum(read.to(tl.int32), 0)
    along, begun = tl.zeros([ROWS], tl.float32), first_of(first, chunk)
    for turn in (tl.static_range if TURNS == 1 else tl.range)(TURNS):
        first_column = turn % TILES * BV
        pulled_CV = tl.zeros([ROWS, BV], tl.float32)
        stand, older, tokens = start, chunk.z, tl.zeros([ROWS], tl.float32)
        for _ in range(count):
            l = candidate_at(stand, chunk, TREE)
            stand = after(stand, TREE)
            w = tl.load(w_rows + i * dscores.t + tl.minimum(COLUMNS + l, L - 1), mask=i < n, other=0.0)
            chunks = tl.where(l < cap, 1 << height_of(l, TREE), older)
            older -= chunks
            tokens += w * tokens_from(begun, older, older + chunks, C)
            sum_KV = load_state(slot_pointer(states, chunk, l, sizes, h, K * K, TREE), first_column, K, K, BK, BV)
            pulled_CV += w[:, None] * tl.dot(q_CK, sum_KV, input_precision=MATH.precision)
        if COLUMNS > 1:
            k_CV = load_rows(k_rows, k.t, n, first_column, ROWS, K, BV, turn).to(MATH.dot)
            pulled_CV = tl.dot(pulled_CC.to(MATH.dot), k_CV, pulled_CV, input_precision=MATH.precision)
        q_CV = load_rows(q_rows, q.t, n, first_column, ROWS, K, BV, turn).to(tl.float32)
        along += tl.where(turn < TILES, tl.sum(pulled_CV * q_CV, 1), 0.0)
        if turn >= TURNS - TILES:
            share = tokens / K
            back = -share if UNIT else inverse * along - shortfall * share
            dq_CV = 2.0 * inverse[:, None] * (pulled_CV - q_CV * back[:, None])
            store_rows(slab_at(dq, chunk, sizes, h, K), dq.t, n, first_column, dq_CV, ROWS, K, BV, turn)


def read_backward(x: Inputs, states: States, dq: Tensor, launch: Launch) -> None:
    """Write dq [B,T,G,K] and states.cumulative."""
    read_backward_kernel[(x.layout.chunks * x.halves * x.groups,)](
        x.q,
        x.k,
        x.level_scales,
        states,
        Slab.of(dq),
        x.first,
        x.layout.table,
        *x.sizes,
        HALVES=x.halves,
        TREE=x.tree,
        **x.row_constants(launch),
    )
