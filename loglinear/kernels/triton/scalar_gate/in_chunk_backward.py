"""What a chunk's queries read inside their own chunk, differentiated.

    dA = (dO V^T) * dec * LAM          dQ += dA K,   dK += dA^T Q     (in walk_backward and chunk_state_backward)
    dV = (Q K^T * dec * LAM)^T dO      dlambda[i, l] = sum over j at level l of (dO V^T * Q K^T * dec)[i, j]

A long chunk is worked on in two halves, and the queries of the second with the keys of the first.
"""

# C chunk, I queries, J keys (as many), H heads, G groups, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.levels import (
    by_level,
    far_classes,
    level_sums,
    load_class_scales,
    near_classes,
    spread_scales,
)
from loglinear.kernels.triton.tiles import (
    SIZES,
    group_program,
    load_rows,
    rows_again,
    scores_tile,
    store_rows,
    zeros_again,
)


@triton.jit(do_not_specialize=SIZES)
def in_chunk_backward_kernel(
    q, k, v, level_scales, cumulative, do, dv, dlevel_scales, row_flow, column_flow, cross_scales, dscores, table,
    T, N, H, R, L, scale, dscores_plane,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, l_b, l_t, l_h, o_b, o_t, o_h, dv_t, dl_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, J: tl.constexpr, LOG_J: tl.constexpr, CROSS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr, LINEAR: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """J tokens of a chunk, its only or one of its two halves, as queries and as keys; R / SPLIT heads of one group.

    Writes dv, row_flow and column_flow [chunk, H, C] (what each token reads here and gives), dscores [plane, chunk,
    group, pair, J, J] (pairs of halves: 00, 10, 11) and the columns of dlevel_scales up to LOG_J.
    CROSS: the second half as queries, the first as keys. Adds to dv and column_flow, and writes dscores and, for the
    walk to go on with, cross_scales [chunk, H, J], the dlambda of these reads."""
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    TILES: tl.constexpr = (V + BV - 1) // BV
    HALVES: tl.constexpr = C // J
    AHEAD: tl.constexpr = J if CROSS else 0  # of the keys are the queries
    ONE_LEVEL: tl.constexpr = LINEAR or CROSS
    split, group, head, share, half, keys, first, c, b, end, z, z0, sequence = group_program(
        table, T, N, H, R, C, 1 if CROSS else HALVES, SPLIT, PACKED
    )
    n = tl.minimum(end - first - AHEAD, J).to(tl.int32)
    if n <= 0:
        return
    i, j = tl.arange(0, J), tl.arange(0, J)
    q_first, token = first + AHEAD, b * T + first
    near_JC, far_JC = near_classes(J).to(tl.float32).to(DOT), far_classes(J).to(tl.float32).to(DOT)
    q_IK = load_rows(q + b * q_b + q_first * q_t + group * q_h, q_t, n, 0, J, K, BK).to(DOT)
    k_JK = load_rows(k + b * k_b + first * k_t + group * k_h, k_t, keys, 0, J, K, BK).to(DOT)
    dscores_IJ = tl.zeros([J, J], tl.float32)
    # Vectors are loaded one head ahead: nothing else would hide their latency.
    scales, row = level_scales + b * l_b + q_first * l_t, c * H * C + half * J
    level = LOG_J + 1 if CROSS else 0
    lambdas_h = load_class_scales(scales + head * l_h, l_t, n, L, level, i, ONE_LEVEL)
    G_h = tl.load(cumulative + row + head * C + AHEAD + i)
    for h in range(head, head + share):
        lambdas, G_i = lambdas_h, G_h
        ahead, rows = tl.minimum(h + 1, head + share - 1), rows_again(h, 0, J)
        lambdas_h = load_class_scales(scales + ahead * l_h, l_t, n, L, level, rows, ONE_LEVEL)
        G_h = tl.load(cumulative + row + ahead * C + AHEAD + rows)

        v_h_, do_h = v + b * v_b + first * v_t + h * v_h, do + b * o_b + q_first * o_t + h * o_h
        to_dv = dv + token * dv_t + h * V
        pulled_IJ = tl.zeros([J, J], tl.float32)
        for tile in (tl.static_range if TILES <= 2 else tl.range)(TILES):
            v_JV = load_rows(v_h_, v_t, keys, tile * BV, J, V, BV, h).to(DOT)
            do_IV = load_rows(do_h, o_t, n, tile * BV, J, V, BV, h).to(DOT)
            pulled_IJ = tl.dot(do_IV, tl.trans(v_JV), pulled_IJ, input_precision=PRECISION)
        scales_IJ = spread_scales(lambdas, near_JC, far_JC, rows, DTYPE, J, ONE_LEVEL, DOT, PRECISION) * scale
        G_j = tl.load(cumulative + row + h * C + rows_again(h, 2, J))
        decay_IJ = tl.exp2(G_i[:, None] - G_j[None, :])
        if not CROSS:
            decay_IJ = tl.where(rows[:, None] >= j[None, :], decay_IJ, 0.0)
        dscores_IJ += pulled_IJ * (decay_IJ * scales_IJ)
        decay_IJ *= tl.dot(q_IK, tl.trans(k_JK), zeros_again(h, J, J), input_precision=PRECISION)
        pulled_IJ *= decay_IJ
        read_IJ = (decay_IJ * scales_IJ).to(DOT)
        for tile in (tl.static_range if TILES <= 2 else tl.range)(TILES):
            if TILES > 1:
                do_IV = load_rows(do_h, o_t, n, tile * BV, J, V, BV, h).to(DOT)
            dv_JV = tl.dot(tl.trans(read_IJ), do_IV, input_precision=PRECISION)
            if CROSS:
                dv_JV += load_rows(to_dv, dv_t, keys, tile * BV, J, V, BV, h).to(tl.float32)
            store_rows(to_dv, dv_t, keys, tile * BV, dv_JV, J, V, BV, h)
        flow_IJ = pulled_IJ * scales_IJ
        again, to_column = rows_again(h, 1, J), column_flow + row + h * C + rows_again(h, 2, J)
        given = tl.sum(flow_IJ, 0)
        if CROSS:
            tl.store(to_column, given + tl.load(to_column))
            tl.store(cross_scales + (c * H + h) * J + again, tl.sum(pulled_IJ, 1) * scale)
        else:
            tl.store(to_column, given)
            tl.store(row_flow + row + h * C + again, tl.sum(flow_IJ, 1))
            to_scales = dlevel_scales + token * dl_t + h * L
            if LINEAR:
                total = tl.sum(pulled_IJ, 1) * scale
                tl.store(to_scales + again * dl_t, total.to(dlevel_scales.dtype.element_ty), mask=again < n)
            else:
                sums_IC = level_sums(pulled_IJ, near_JC, far_JC, again, J, DOT, PRECISION) * scale
                column = tl.arange(0, 16)[None, :]
                tl.store(
                    to_scales + ((again * dl_t)[:, None] + column),
                    by_level(sums_IC, again, L, J, LOG_J).to(dlevel_scales.dtype.element_ty),
                    mask=(again < n)[:, None] & (column < tl.minimum(L, LOG_J + 1)),
                )
    tile_IJ = scores_tile(dscores, dscores_plane, split, c, H // R, group, 1 if CROSS else half, half, HALVES, J)
    tl.store(tile_IJ + (i[:, None] * J + j[None, :]), dscores_IJ.to(dscores.dtype.element_ty))
