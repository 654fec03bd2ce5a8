"""The reads of a chunk's queries: their own chunk, and the blocks before it.

O = (A * LAM) V + sum over the walk's blocks of diag(lambda_l) (Q' Diag(P_path)) S_block

A and Q' are those of `decayed_rows`; P_path [K] is the decay over the nearer blocks.
"""

# C chunk, H heads, K key, V value, L levels
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Sizes
from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.diagonal_gate.states import Inputs
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.levels import far_classes, load_class_scales, load_scale, near_classes, spread_scales
from loglinear.kernels.triton.scalar_gate.states import States
from loglinear.kernels.triton.tiles import head_program, load_rows, load_state, locate, rows_at, store_rows
from loglinear.kernels.triton.walks import after, candidate_at, load_channels, slot_pointer, start_of_walk, walk


@launcher
@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    q,
    v,
    level_scales,
    scores,
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
    BK: tl.constexpr,
    BV: tl.constexpr,
    ONE_LEVEL: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk, one head, one tile of V."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (V + BV - 1) // BV
    DTYPE: tl.constexpr = level_scales.data.dtype.element_ty
    tile, h, c = head_program(TILES, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    n = chunk.n
    if n <= 0:
        return
    i, scales, l_t = tl.arange(0, C), rows_at(level_scales, chunk, h), level_scales.t
    lambdas = load_class_scales(scales, l_t, n, L, 0, i, ONE_LEVEL, TREE)
    scores_CC = tl.load(scores + (chunk.c * sizes.H + h) * (C * C) + (i[:, None] * C + i[None, :]))
    v_CV = load_rows(rows_at(v, chunk, h), v.t, n, tile * BV, C, V, BV).to(MATH.dot)
    near_JC, far_JC = near_classes(C).to(tl.float32).to(MATH.dot), far_classes(C).to(tl.float32).to(MATH.dot)
    weights_CC = spread_scales(lambdas, l_t, n, L, near_JC, far_JC, i, DTYPE, C, ONE_LEVEL, TREE, MATH) * scale
    out_CV = tl.dot((weights_CC * scores_CC).to(MATH.dot), v_CV, input_precision=MATH.precision)

    q_CK = load_rows(rows_at(q, chunk, h), q.t, n, 0, C, K, BK).to(tl.float32)
    read, _, _ = walk(chunk, sizes.cap, TREE)
    stand = start_of_walk(read, chunk, TREE)
    # lambda of a block is loaded one read ahead.
    ahead = load_scale(scales, l_t, n, TREE.column + candidate_at(stand, chunk, TREE), L, i)
    path_K = tl.zeros([BK], tl.float32)
    for _ in range(tl.sum(read.to(tl.int32), 0)):
        l = candidate_at(stand, chunk, TREE)
        stand = after(stand, TREE)
        weight = prefetched(ahead, DTYPE) * scale
        ahead = load_scale(scales, l_t, n, TREE.column + candidate_at(stand, chunk, TREE), L, i)
        seen_CK = (q_CK * tl.exp2(path_K)[None, :]).to(MATH.dot)
        state_KV = load_state(slot_pointer(states, chunk, l, sizes, h, K * V, TREE), tile * BV, K, V, BK, BV)
        out_CV += weight[:, None] * tl.dot(seen_CK, state_KV, input_precision=MATH.precision)
        path_K += load_channels(states.log_decay, chunk, l, sizes, h, K, BK, TREE)
    rows = out + ((chunk.b * sizes.T + chunk.first) * sizes.H + h) * V
    store_rows(rows, sizes.H * V, n, tile * BV, out_CV, C, V, BV)


def output(x: Inputs, scores: Tensor, states: States, launch: Launch) -> Tensor:
    """[B, T, H, V] in v's dtype, of a call whose queries have decayed."""
    v = x.v.data
    out = x.empty(*v.shape, dtype=v.dtype)
    output_kernel[(x.layout.chunks * x.heads * x.value_tiles(launch),)](
        x.q,
        x.v,
        x.level_scales,
        scores,
        states,
        out,
        x.layout.table,
        *x.sizes,
        x.scale,
        ONE_LEVEL=x.is_one_level,
        TREE=x.tree,
        **x.constants(launch),
    )
    return out
