"""The gifts of a chunk's tokens, differentiated on the side of the keys and values.

    dV += diag(exp(Gam - G)) K dS          dK = diag(exp(Gam - G)) V dS^T + dA^T Q

The first terms are the adjoint of `chunk_state`; dA, of the chunk itself, comes from `in_chunk_backward`.
"""

# C chunk, H heads, G groups, K key, V value
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Planes, Sizes, Slab
from loglinear.kernels.triton.compiler import identity, to_mma_layout
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.scalar_gate.states import Inputs, Inside, StateGradients, States
from loglinear.kernels.triton.tiles import (
    load_rows,
    load_state,
    part_of_program,
    rows_at,
    scores_at,
    slab_at,
    store_rows,
)


@launcher
@triton.jit(do_not_specialize=SIZES)
def chunk_state_backward_kernel(
    q,
    k,
    v,
    states,
    dslots,
    dscores,
    dk,
    dv,
    dlog_state,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    HALVES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SPLIT: tl.constexpr,
    MATH: tl.constexpr,
):
    """One half of a chunk and R / SPLIT heads of one group. Writes dk (one plane) and dlog_state [chunk, H, C], of the
    decays: each token's gift to the state. Adds to dv."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (V + BV - 1) // BV
    ROWS: tl.constexpr = C // HALVES
    part = part_of_program(table, sizes, C, HALVES, SPLIT)
    chunk, half, head = part.chunk, part.half, part.head
    n, groups = chunk.n, H // sizes.R
    if n <= 0:
        return
    i = tl.arange(0, ROWS)
    q_rows = rows_at(q, chunk, part.group)
    one = identity(BV, MATH)
    dk_CK = tl.zeros([ROWS, BK], tl.float32)
    # The second half may have no tokens, and then no dscores.
    for later in range(half, tl.where(chunk.end - chunk.first > ROWS, HALVES, half + 1)):
        n_later = tl.minimum(chunk.end - chunk.first - (later - half) * ROWS, ROWS).to(tl.int32)
        tile_CC = scores_at(dscores, part, groups, later, half, HALVES, ROWS)
        dscores_CC = tl.load(tile_CC + i[:, None] * ROWS + i[None, :])
        q_CK = load_rows(q_rows + (later - half) * ROWS * q.t, q.t, n_later, 0, ROWS, K, BK).to(MATH.dot)
        dk_CK = tl.dot(tl.trans(dscores_CC), q_CK, dk_CK, input_precision=MATH.precision)
    k_CK = load_rows(rows_at(k, chunk, part.group), k.t, n, 0, ROWS, K, BK).to(MATH.dot)
    row = (chunk.c * H + head) * C + half * ROWS + i
    G_h, total_h = tl.load(states.cumulative + row), tl.load(states.totals + chunk.c * H + head)
    for h in range(head, head + part.heads):
        # Vectors are loaded one head ahead.
        to_end = tl.exp2(total_h - G_h)[:, None]
        ahead = tl.minimum(h + 1, head + part.heads - 1)
        G_h = tl.load(states.cumulative + row + (ahead - head) * C)
        total_h = tl.load(states.totals + chunk.c * H + ahead)
        dlog = tl.zeros([ROWS], tl.float32)
        for tile in (tl.static_range if TILES <= 2 else tl.range)(TILES):
            to_dv = slab_at(dv, chunk, sizes, h, V)
            in_chunk_CV = load_rows(to_dv, dv.t, n, tile * BV, ROWS, V, BV, h)
            v_CV = load_rows(rows_at(v, chunk, h), v.t, n, tile * BV, ROWS, V, BV, h).to(MATH.dot)
            v_CV = to_mma_layout(v_CV, one, MATH)
            dstate_KV = load_state(dslots + (chunk.c * H + h) * (K * V), tile * BV, K, V, BK, BV)
            decayed_CV = (v_CV * to_end).to(MATH.dot)
            dk_CK = tl.dot(decayed_CV, tl.trans(dstate_KV), dk_CK, input_precision=MATH.precision)
            dv_CV = tl.dot(k_CK, dstate_KV, input_precision=MATH.precision) * to_end
            dlog += tl.sum(dv_CV * v_CV, 1)
            dv_CV += in_chunk_CV.to(tl.float32)
            store_rows(to_dv, dv.t, n, tile * BV, dv_CV, ROWS, V, BV, h)
        tl.store(dlog_state + row + (h - head) * C, dlog)
    rows = dk.data + part.split * dk.plane + ((chunk.b * sizes.T + chunk.first) * groups + part.group) * K
    store_rows(rows, groups * K, n, 0, dk_CK, ROWS, K, BK)


def chunk_state_backward(
    x: Inputs, states: States, dstates: StateGradients, inside: Inside, dk: Planes, dv: Slab, launch: Launch
) -> Tensor:
    """Write dk, complete dv, and return dlog_state [chunk, H, C]. dstates: of the chunks' own states."""
    y, dlog_state = x.layout, x.empty(x.layout.chunks, x.heads, x.chunk_size)
    chunk_state_backward_kernel[(y.chunks * x.halves * x.groups * x.splits,)](
        x.q,
        x.k,
        x.v,
        states,
        dstates.slots,
        inside.dscores,
        dk,
        dv,
        dlog_state,
        y.table,
        *x.sizes,
        HALVES=x.halves,
        SPLIT=x.splits,
        **x.constants(launch),
    )
    return dlog_state
