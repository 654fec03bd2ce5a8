"""The reads of a chunk's queries inside their own chunk, differentiated.

    dA = (dO V^T) * dec * LAM          dQ += dA K,   dK += dA^T Q     (in walk_backward and chunk_state_backward)
    dV = (Q K^T * dec * LAM)^T dO      dlambda[i, l] = sum over j at level l of (dO V^T * Q K^T * dec)[i, j]

A long chunk is worked on in two halves, and the queries of the second with the keys of the first.
"""

# C chunk, I queries, J keys (as many), H heads, G groups, K key, V value, L levels
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Planes, Rows, Sizes, Slab
from loglinear.kernels.triton.compiler import fresh_arange, fresh_zeros
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.levels import (
    far_classes,
    load_class_scales,
    near_classes,
    spread_scales,
    store_column_sums,
)
from loglinear.kernels.triton.scalar_gate.states import Inputs, Inside
from loglinear.kernels.triton.tiles import load_rows, part_of, part_of_program, rows_at, scores_at, slab_at, store_rows


@launcher
@triton.jit(do_not_specialize=SIZES)
def in_chunk_backward_kernel(
    q,
    k,
    v,
    level_scales,
    cumulative,
    do,
    dv,
    dlevel_scales,
    inside,
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
    J: tl.constexpr,
    COLUMNS: tl.constexpr,
    CROSS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SPLIT: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """J tokens of a chunk, its only or one of its two halves, as queries and as keys; R / SPLIT heads of one group.

    Writes dv, and of `inside` dlog_row, dlog_column and dscores; and the first COLUMNS of dlevel_scales, the only one
    where all reads have one column.
    CROSS: the second half as queries, the first as keys. Adds to dv and dlog_column, and writes dscores and, for the
    walk to go on with, dcross_scales, the dlambda of these reads."""
    sizes = Sizes(T, N, H, R, L, cap)
    DTYPE: tl.constexpr = level_scales.data.dtype.element_ty
    TILES: tl.constexpr = (V + BV - 1) // BV
    HALVES: tl.constexpr = C // J
    AHEAD: tl.constexpr = 1 if CROSS else 0  # of the keys are the queries, in halves
    LINEAR: tl.constexpr = COLUMNS == 1
    ONE_LEVEL: tl.constexpr = LINEAR or CROSS
    part = part_of_program(table, sizes, C, 1 if CROSS else HALVES, SPLIT)
    keys = part.chunk
    queries = part_of(keys, AHEAD, J)
    n = queries.n
    if n <= 0:
        return
    i, j = tl.arange(0, J), tl.arange(0, J)
    near_JC, far_JC = near_classes(J).to(tl.float32).to(MATH.dot), far_classes(J).to(tl.float32).to(MATH.dot)
    q_IK = load_rows(rows_at(q, queries, part.group), q.t, n, 0, J, K, BK).to(MATH.dot)
    k_JK = load_rows(rows_at(k, keys, part.group), k.t, keys.n, 0, J, K, BK).to(MATH.dot)
    dscores_IJ = tl.zeros([J, J], tl.float32)
    # Vectors are loaded one head ahead: nothing else would hide their latency.
    row, l_t = keys.c * H * C + part.half * J, level_scales.t
    level = TREE.column - 1 if CROSS else 0
    lambdas_h = load_class_scales(rows_at(level_scales, queries, part.head), l_t, n, L, level, i, ONE_LEVEL, TREE)
    G_h = tl.load(cumulative + row + part.head * C + AHEAD * J + i)
    for h in range(part.head, part.head + part.heads):
        lambdas, G_i = lambdas_h, G_h
        ahead, rows = tl.minimum(h + 1, part.head + part.heads - 1), fresh_arange(h, 0, J)
        lambdas_h = load_class_scales(rows_at(level_scales, queries, ahead), l_t, n, L, level, rows, ONE_LEVEL, TREE)
        G_h = tl.load(cumulative + row + ahead * C + AHEAD * J + rows)

        v_rows, do_rows, dv_rows = rows_at(v, keys, h), rows_at(do, queries, h), slab_at(dv, keys, sizes, h, V)
        pulled_IJ = tl.zeros([J, J], tl.float32)
        for tile in (tl.static_range if TILES <= 2 else tl.range)(TILES):
            v_JV = load_rows(v_rows, v.t, keys.n, tile * BV, J, V, BV, h).to(MATH.dot)
            do_IV = load_rows(do_rows, do.t, n, tile * BV, J, V, BV, h).to(MATH.dot)
            pulled_IJ = tl.dot(do_IV, tl.trans(v_JV), pulled_IJ, input_precision=MATH.precision)
        scales_IJ = spread_scales(lambdas, l_t, n, L, near_JC, far_JC, rows, DTYPE, J, ONE_LEVEL, TREE, MATH) * scale
        G_j = tl.load(cumulative + row + h * C + fresh_arange(h, 2, J))
        decay_IJ = tl.exp2(G_i[:, None] - G_j[None, :])
        if not CROSS:
            decay_IJ = tl.where(rows[:, None] >= j[None, :], decay_IJ, 0.0)
        dscores_IJ += pulled_IJ * (decay_IJ * scales_IJ)
        decay_IJ *= tl.dot(q_IK, tl.trans(k_JK), fresh_zeros(h, J, J), input_precision=MATH.precision)
        pulled_IJ *= decay_IJ
        read_IJ = (decay_IJ * scales_IJ).to(MATH.dot)
        for tile in (tl.static_range if TILES <= 2 else tl.range)(TILES):
            if TILES > 1:
                do_IV = load_rows(do_rows, do.t, n, tile * BV, J, V, BV, h).to(MATH.dot)
            dv_JV = tl.dot(tl.trans(read_IJ), do_IV, input_precision=MATH.precision)
            if CROSS:
                dv_JV += load_rows(dv_rows, dv.t, keys.n, tile * BV, J, V, BV, h).to(tl.float32)
            store_rows(dv_rows, dv.t, keys.n, tile * BV, dv_JV, J, V, BV, h)
        dlog_IJ = pulled_IJ * scales_IJ
        again, to_column = fresh_arange(h, 1, J), inside.dlog_column + row + h * C + fresh_arange(h, 2, J)
        dlog_J = tl.sum(dlog_IJ, 0)
        if CROSS:
            tl.store(to_column, dlog_J + tl.load(to_column))
            tl.store(inside.dcross_scales + (keys.c * H + h) * J + again, tl.sum(pulled_IJ, 1) * scale)
        else:
            tl.store(to_column, dlog_J)
            tl.store(inside.dlog_row + row + h * C + again, tl.sum(dlog_IJ, 1))
            dscales = slab_at(dlevel_scales, keys, sizes, h, L)
            dtype = dlevel_scales.data.dtype.element_ty
            if LINEAR:
                total = tl.sum(pulled_IJ, 1) * scale
                tl.store(dscales + again * dlevel_scales.t, total.to(dtype), mask=again < n)
            else:
                store_column_sums(
                    dscales,
                    dlevel_scales.t,
                    n,
                    L,
                    pulled_IJ,
                    scale,
                    near_JC,
                    far_JC,
                    again,
                    J,
                    COLUMNS,
                    TREE,
                    MATH,
                )
    tile_IJ = scores_at(inside.dscores, part, H // sizes.R, AHEAD + part.half, part.half, HALVES, J)
    tl.store(tile_IJ + (i[:, None] * J + j[None, :]), dscores_IJ.to(inside.dscores.data.dtype.element_ty))


def in_chunk_backward(x: Inputs, cumulative: Tensor, do: Rows, dv: Slab, dlevel_scales: Slab, launch: Launch) -> Inside:
    """Write dv of the reads inside the chunks, and dlambda of their levels; return the rest."""
    chunks, H, rows, halves = x.layout.chunks, x.heads, x.rows, x.halves
    pairs = halves * (halves + 1) // 2
    inside = Inside(
        Planes.of(x.empty(x.splits, chunks, x.groups, pairs, rows, rows, dtype=x.dtype)),
        dlog_row=x.empty(chunks, H, x.chunk_size),
        dlog_column=x.empty(chunks, H, x.chunk_size),
        dcross_scales=x.empty(chunks if halves > 1 else 0, H, rows),
    )
    for cross in range(halves):
        grid = chunks * (halves // (1 + cross)) * x.groups * x.splits
        in_chunk_backward_kernel[(grid,)](
            x.q,
            x.k,
            x.v,
            x.level_scales,
            cumulative,
            do,
            dv,
            dlevel_scales,
            inside,
            x.layout.table,
            *x.sizes,
            x.scale,
            J=rows,
            COLUMNS=1 if x.is_one_level else x.columns,
            CROSS=cross == 1,
            SPLIT=x.splits,
            TREE=x.tree,
            **x.constants(launch),
        )
    return inside
