"""The reads of a chunk's queries: their own chunk, and the blocks before it.

O = ((Q K^T * dec) * LAM) V + sum over the walk's blocks of diag(lambda_l exp(G) P_path) (Q S_block)
"""

# C chunk, H heads, K key, V value, L levels
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Sizes
from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.levels import far_classes, load_class_scales, load_scale, near_classes, spread_scales
from loglinear.kernels.triton.scalar_gate.states import Inputs, States
from loglinear.kernels.triton.tiles import head_program, load_rows, load_state, locate, part_of, rows_at, store_rows
from loglinear.kernels.triton.walks import (
    after,
    candidate_at,
    load_log_decays,
    path_of,
    slot_pointer,
    start_of_walk,
    walk,
)


@launcher
@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    q,
    k,
    v,
    level_scales,
    states,
    out,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    HALVES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ONE_LEVEL: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One half of a chunk, one head, one tile of V; heads are the fastest axis, so that neighbours share keys."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (V + BV - 1) // BV
    ROWS: tl.constexpr = C // HALVES
    DTYPE: tl.constexpr = level_scales.data.dtype.element_ty
    tile, h, part = head_program(TILES, H)
    half = part % HALVES
    chunk = part_of(locate((part // HALVES).to(tl.int64), table, sizes, C), half, ROWS)
    n = chunk.n
    if n <= 0:
        return
    i, row = tl.arange(0, ROWS), (chunk.c * H + h) * C + half * ROWS
    scales = rows_at(level_scales, chunk, h)
    k_rows, v_rows = rows_at(k, chunk, h // sizes.R), rows_at(v, chunk, h)
    q_CK = load_rows(rows_at(q, chunk, h // sizes.R), q.t, n, 0, ROWS, K, BK).to(MATH.dot)
    k_CK = load_rows(k_rows, k.t, n, 0, ROWS, K, BK).to(MATH.dot)
    v_CV = load_rows(v_rows, v.t, n, tile * BV, ROWS, V, BV).to(MATH.dot)
    G = tl.load(states.cumulative + row + i)
    lambdas = load_class_scales(scales, level_scales.t, n, L, 0, i, ONE_LEVEL, TREE)
    read, end_of_blocks, are_initial = walk(chunk, sizes.cap, TREE)
    log_block = load_log_decays(states.log_decay, chunk, sizes, h, TREE)
    stand = start_of_walk(read, chunk, TREE)
    # lambda of a block is loaded one read ahead.
    ahead = load_scale(scales, level_scales.t, n, TREE.column + candidate_at(stand, chunk, TREE), L, i)

    near_JC, far_JC = near_classes(ROWS).to(tl.float32).to(MATH.dot), far_classes(ROWS).to(tl.float32).to(MATH.dot)
    weights_CC = spread_scales(lambdas, level_scales.t, n, L, near_JC, far_JC, i, DTYPE, ROWS, ONE_LEVEL, TREE, MATH)
    weights_CC *= scale
    weights_CC = weights_CC * tl.where(i[:, None] >= i[None, :], tl.exp2(G[:, None] - G[None, :]), 0.0)
    weights_CC *= tl.dot(q_CK, tl.trans(k_CK), input_precision=MATH.precision)
    out_CV = tl.dot(weights_CC.to(MATH.dot), v_CV, input_precision=MATH.precision)
    if half > 0:
        # The second half reads all of the first at one level; exp(G_i - G_j) through the end of the first.
        before = states.cumulative + row - ROWS
        between = tl.load(before + ROWS - 1)
        weight = prefetched(load_scale(scales, level_scales.t, n, TREE.column - 1, L, i), DTYPE)
        weight = weight * scale * tl.exp2(G - between)
        to_end = tl.exp2(between - tl.load(before + i))
        k_before = load_rows(k_rows - ROWS * k.t, k.t, ROWS, 0, ROWS, K, BK).to(MATH.dot)
        v_before = load_rows(v_rows - ROWS * v.t, v.t, ROWS, tile * BV, ROWS, V, BV).to(MATH.dot)
        scores_CC = tl.dot(q_CK, tl.trans(k_before), input_precision=MATH.precision)
        scores_CC *= weight[:, None] * to_end[None, :]
        out_CV = tl.dot(scores_CC.to(MATH.dot), v_before, out_CV, input_precision=MATH.precision)

    for _ in range(tl.sum(read.to(tl.int32), 0)):
        l = candidate_at(stand, chunk, TREE)
        stand = after(stand, TREE)
        weight = prefetched(ahead, DTYPE) * scale * tl.exp2(G + path_of(l, log_block, TREE))
        ahead = load_scale(scales, level_scales.t, n, TREE.column + candidate_at(stand, chunk, TREE), L, i)
        state_KV = load_state(slot_pointer(states, chunk, l, sizes, h, K * V, TREE), tile * BV, K, V, BK, BV)
        out_CV += weight[:, None] * tl.dot(q_CK, state_KV, input_precision=MATH.precision)
    rows = out + ((chunk.b * sizes.T + chunk.first) * H + h) * V
    store_rows(rows, H * V, n, tile * BV, out_CV, ROWS, V, BV)


def output(x: Inputs, states: States, launch: Launch) -> Tensor:
    """[B, T, H, V] in v's dtype."""
    v = x.v.data
    out = x.empty(*v.shape, dtype=v.dtype)
    grid = x.layout.chunks * x.halves * x.heads * x.value_tiles(launch)
    output_kernel[(grid,)](
        x.q,
        x.k,
        x.v,
        x.level_scales,
        states,
        out,
        x.layout.table,
        *x.sizes,
        x.scale,
        HALVES=x.halves,
        ONE_LEVEL=x.is_one_level,
        TREE=x.tree,
        **x.constants(launch),
    )
    return out
