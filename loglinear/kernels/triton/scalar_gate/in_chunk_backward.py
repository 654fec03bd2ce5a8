"""What a chunk's queries read inside their own chunk, differentiated.

    dA = (dO V^T) * dec * LAM          dQ += dA K,   dK += dA^T Q     (in walk_backward and chunk_state_backward)
    dV = (Q K^T * dec * LAM)^T dO      dlambda[i, l] = sum over j at level l of (dO V^T * Q K^T * dec)[i, j]

A long chunk is worked on in two halves of its keys, each with the queries from there to the end of the chunk.
"""

# C chunk, I queries, J keys, H heads, G groups, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.tiles import (
    SIZES,
    group_program,
    load_rows,
    load_scale,
    rows_again,
    spread_scales,
    store_rows,
    sums_at_level,
    zeros_again,
)


@triton.jit
def store_level_gradients(
    to, stride, cross_scales, pulled_IJ, blocks_JB, i, n, L, scale,
    I: tl.constexpr, J: tl.constexpr, LOG_J: tl.constexpr, LINEAR: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dlambda of the first J queries at their levels; levels from the last on are summed into its column. Of the
    queries behind them, which see all keys at one level, into cross_scales.

    Near levels are sums over single keys, far ones over 16 blocks of keys, whose sums are one product."""
    inside = i < tl.minimum(n, J)
    if LINEAR:
        total = tl.sum(pulled_IJ, 1) * scale
        tl.store(to + i * stride, total.to(to.dtype.element_ty), mask=inside)
    else:
        NEAR: tl.constexpr = LOG_J - 4
        past = tl.zeros([I], tl.float32)
        by_block = tl.dot(pulled_IJ.to(DOT), blocks_JB, input_precision=PRECISION)
        for level in tl.static_range(LOG_J + 1):
            if level <= NEAR:
                gradient = sums_at_level(pulled_IJ, i, J, level)
            else:
                gradient = sums_at_level(by_block, i >> NEAR, 16, level - NEAR)
            past = tl.where(level > L - 1, past, 0.0) + gradient * scale
            tl.store(to + (i * stride + tl.minimum(level, L - 1)), past.to(to.dtype.element_ty), mask=inside)
        total = tl.sum(by_block, 1) * scale
    if I > J:
        tl.store(cross_scales + i - J, total, mask=i >= J)


@triton.jit(do_not_specialize=SIZES)
def in_chunk_backward_kernel(
    q, k, v, level_scales, cumulative, do, dv, dlevel_scales, row_flow, column_flow, cross_scales, dscores, table,
    T, N, H, R, L, scale, dscores_plane,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, l_b, l_t, l_h, o_b, o_t, o_h, dv_t, dl_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_J: tl.constexpr, J: tl.constexpr, I: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr, LINEAR: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The last I tokens of a chunk as queries, the first J of them as keys; R / SPLIT heads of one group.

    Writes dv, row_flow and column_flow [chunk, H, C] (what each token reads here and gives), dscores [plane, chunk,
    group, pair, J, J] (pairs of halves: 00, 10, 11), the columns of dlevel_scales up to LOG_J, and with I > J, instead of
    the other queries' dlevel_scales and row_flow, cross_scales [chunk, H, J], their dlambda."""
    LEVELS: tl.constexpr = 0 if LINEAR else (LOG_J if I == J else LOG_J + 1)
    TILES: tl.constexpr = (V + BV - 1) // BV
    PAIRS: tl.constexpr = 1 if C == J else 3
    split, group, head, share, half, n, first, c, b, end, z, z0, sequence = group_program(
        table, T, N, H, R, C, 1, SPLIT, PACKED
    )
    first += C - I
    n = tl.minimum(end - first, I).to(tl.int32)
    if n <= 0:
        return
    token, i, j = b * T + first, tl.arange(0, I), tl.arange(0, J)
    blocks_JB = ((j[:, None] >> (LOG_J - 4)) == tl.arange(0, 16)[None, :]).to(tl.float32).to(DOT)
    q_IK = load_rows(q + b * q_b + first * q_t + group * q_h, q_t, n, 0, I, K, BK).to(DOT)
    k_JK = load_rows(k + b * k_b + first * k_t + group * k_h, k_t, n, 0, J, K, BK).to(DOT)
    dscores_IJ = tl.zeros([I, J], tl.float32)
    # Vectors are loaded one head ahead: nothing else would hide their latency.
    scales, row = level_scales + b * l_b + first * l_t, cumulative + c * H * C + C - I
    own_h = load_scale(scales + head * l_h, l_t, n, 0, L, i)
    far_h = load_scale(scales + head * l_h, l_t, n, LEVELS, L, i)
    G_i_h, G_j_h = tl.load(row + head * C + i), tl.load(row + head * C + j)
    for h in range(head, head + share):
        own, far, G_i, G_j = own_h, far_h, G_i_h, G_j_h
        ahead = tl.minimum(h + 1, head + share - 1)
        own_h = load_scale(scales + ahead * l_h, l_t, n, 0, L, i)
        far_h = load_scale(scales + ahead * l_h, l_t, n, LEVELS, L, i)
        G_i_h, G_j_h = tl.load(row + ahead * C + i), tl.load(row + ahead * C + j)

        v_h_, do_h = v + b * v_b + first * v_t + h * v_h, do + b * o_b + first * o_t + h * o_h
        pulled_IJ = tl.zeros([I, J], tl.float32)
        for tile in tl.static_range(TILES):
            v_JV = load_rows(v_h_, v_t, n, tile * BV, J, V, BV).to(DOT)
            do_IV = load_rows(do_h, o_t, n, tile * BV, I, V, BV).to(DOT)
            pulled_IJ = tl.dot(do_IV, tl.trans(v_JV), pulled_IJ, input_precision=PRECISION)
        rows = rows_again(h, 0, I)
        scales_IJ = spread_scales(own, far, scales + h * l_h, l_t, n, L, scale, rows, J, LEVELS)
        decay_IJ = tl.where(rows[:, None] >= j[None, :], tl.exp2(G_i[:, None] - G_j[None, :]), 0.0)
        dscores_IJ += pulled_IJ * (decay_IJ * scales_IJ)
        decay_IJ *= tl.dot(q_IK, tl.trans(k_JK), zeros_again(h, I, J), input_precision=PRECISION)
        pulled_IJ *= decay_IJ
        read_IJ = (decay_IJ * scales_IJ).to(DOT)
        for tile in tl.static_range(TILES):
            if TILES > 1:
                do_IV = load_rows(do_h, o_t, n, tile * BV, I, V, BV).to(DOT)
            dv_JV = tl.dot(tl.trans(read_IJ), do_IV, input_precision=PRECISION)
            store_rows(dv + token * dv_t + h * V, dv_t, n, tile * BV, dv_JV, J, V, BV)
        flow_IJ = pulled_IJ * scales_IJ
        to = (c * H + h) * C + C - I
        tl.store(row_flow + to + i, tl.sum(flow_IJ, 1), mask=i < J)
        tl.store(column_flow + to + j, tl.sum(flow_IJ, 0))
        store_level_gradients(
            dlevel_scales + token * dl_t + h * L, dl_t, cross_scales + (c * H + h) * J,
            pulled_IJ, blocks_JB, rows_again(h, 1, I), n, L, scale, I, J, LOG_J, LINEAR, DOT, PRECISION,
        )  # fmt: skip
    tiles = dscores + split * dscores_plane + ((c * (H // R) + group) * PAIRS + (C - I) // J * 2) * (J * J)
    tl.store(tiles + (i[:, None] * J + j[None, :]), dscores_IJ.to(dscores.dtype.element_ty))
