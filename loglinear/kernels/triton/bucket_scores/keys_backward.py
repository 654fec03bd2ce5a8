"""The sums of chunks, differentiated on the keys' side.

    dK = 2 / |k|^2 (B - k (k . B) / |k|^2)        B = K dM_z + (W * Q K^T / |q|^2)^T Q

dM_z is the gradient of the chunk's own sum, and symmetric. W are the gradients of the scores inside the chunk, as in
`read_backward`.
"""

# C chunk, G groups, K key, L columns
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Sizes, Slab
from loglinear.kernels.triton.bucket_scores.inputs import Inputs
from loglinear.kernels.triton.bucket_scores.lengths import inverse_squares
from loglinear.kernels.triton.bucket_scores.read_backward import load_pairs
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
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


@launcher
@triton.jit(do_not_specialize=SIZES)
def keys_backward_kernel(
    q,
    k,
    dscores,
    dslots,
    dk,
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
    """One half of a chunk, one group. Writes dk; as in `read_backward` several tiles are computed twice."""
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
    i = tl.arange(0, ROWS)
    q_rows, k_rows = rows_at(q, chunk, h), rows_at(k, chunk, h)
    k_CK = load_rows(k_rows, k.t, n, 0, ROWS, K, BK)
    inverse = inverse_squares(k_CK, UNIT)
    k_CK = k_CK.to(MATH.dot)
    if COLUMNS > 1:
        q_CK = load_rows(q_rows, q.t, n, 0, ROWS, K, BK)
        pulled_CC = tl.dot(q_CK.to(MATH.dot), tl.trans(k_CK), input_precision=MATH.precision)
        pulled_CC *= load_pairs(dscores, rows_at(dscores, chunk, h), n, L, i, ROWS, TREE)
        pulled_CC *= inverse_squares(q_CK, UNIT)[:, None]
    along = tl.zeros([ROWS], tl.float32)
    for turn in (tl.static_range if TURNS == 1 else tl.range)(TURNS):
        first_column = turn % TILES * BV
        dsum_KV = load_state(dslots + (chunk.c * sizes.H + h) * (K * K), first_column, K, K, BK, BV, turn)
        pulled_CV = tl.dot(k_CK, dsum_KV, input_precision=MATH.precision)
        if COLUMNS > 1:
            q_CV = load_rows(q_rows, q.t, n, first_column, ROWS, K, BV, turn).to(MATH.dot)
            pulled_CV = tl.dot(tl.trans(pulled_CC.to(MATH.dot)), q_CV, pulled_CV, input_precision=MATH.precision)
        k_CV = load_rows(k_rows, k.t, n, first_column, ROWS, K, BV, turn).to(tl.float32)
        along += tl.where(turn < TILES, tl.sum(pulled_CV * k_CV, 1), 0.0)
        if turn >= TURNS - TILES:
            back = tl.zeros([ROWS], tl.float32) if UNIT else inverse * along
            dk_CV = 2.0 * inverse[:, None] * (pulled_CV - k_CV * back[:, None])
            store_rows(slab_at(dk, chunk, sizes, h, K), dk.t, n, first_column, dk_CV, ROWS, K, BV, turn)


def keys_backward(x: Inputs, dslots: Tensor, dk: Tensor, launch: Launch) -> None:
    """Write dk [B,T,G,K]. dslots: of the chunks' own sums."""
    keys_backward_kernel[(x.layout.chunks * x.halves * x.groups,)](
        x.q,
        x.k,
        x.level_scales,
        dslots,
        Slab.of(dk),
        x.layout.table,
        *x.sizes,
        HALVES=x.halves,
        TREE=x.tree,
        **x.row_constants(launch),
    )
