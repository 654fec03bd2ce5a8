"""What a chunk's queries read inside their own chunk, differentiated.

    dA = (dO V^T) * dec * LAM          dQ += dA K,   dK = dA^T Q
    dV = (Q K^T * dec * LAM)^T dO      dlambda[i, l] = sum over j at level l of (dO V^T * Q K^T * dec)[i, j]

Q K^T is computed once for a group's heads, and dA summed over them before its two products.
"""

# C chunk, H heads, G groups, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.tiles import (
    SIZES,
    group_program,
    is_left_sibling,
    level_columns,
    load_in_chunk_scales,
    load_rows,
    siblings,
    spread_scales,
    store_rows,
)


@triton.jit(do_not_specialize=SIZES)
def in_chunk_backward_kernel(
    q, k, v, level_scales, cumulative, do, dq, dk, dv, dlevel_scales, row_flow, column_flow, table,
    T, N, H, R, L, scale, plane,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, l_b, l_t, l_h, o_b, o_t, o_h, dv_t, dl_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk and R / SPLIT heads of one group. Writes dk (plane `split`, float32), dv, column_flow [chunk, H, C]
    (what each token gives to others) and the columns of dlevel_scales up to LOG_C (adding to the last one where blocks
    share it); adds to the dq and row_flow that the walk left."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    split, group, head, share, c, b, first, end, z, z0, sequence = group_program(table, T, N, H, R, C, SPLIT, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    token, groups = b * T + first, H // R
    i, l = tl.arange(0, C), tl.arange(0, LEVELS)
    is_diagonal = i[:, None] == i[None, :]
    sibling_CC = siblings(C, LOG_C).to(tl.float32).to(DOT)
    level_LC = level_columns(C, LOG_C, LEVELS).to(tl.float32).to(DOT)
    q_CK = load_rows(q + b * q_b + first * q_t + group * q_h, q_t, n, 0, C, K, BK).to(DOT)
    k_CK = load_rows(k + b * k_b + first * k_t + group * k_h, k_t, n, 0, C, K, BK).to(DOT)
    scores_CC = tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION)
    dscores_CC = tl.zeros([C, C], tl.float32)
    for h in range(head, head + share):
        row = (c * H + h) * C + i
        G = tl.load(cumulative + row)
        do_h, v_h_ = do + b * o_b + first * o_t + h * o_h, v + b * v_b + first * v_t + h * v_h
        pulled_CC = tl.zeros([C, C], tl.float32)
        if TILES == 1:
            do_CV = load_rows(do_h, o_t, n, 0, C, V, BV).to(DOT)
        for tile in range(TILES):
            if TILES > 1:
                do_CV = load_rows(do_h, o_t, n, tile * BV, C, V, BV).to(DOT)
            v_CV = load_rows(v_h_, v_t, n, tile * BV, C, V, BV).to(DOT)
            pulled_CC = tl.dot(do_CV, tl.trans(v_CV), pulled_CC, input_precision=PRECISION)
        scales_h = level_scales + b * l_b + first * l_t + h * l_h
        scales = load_in_chunk_scales(scales_h, l_t, n, L, 1.0, C, LEVELS)
        own = tl.load(scales_h + i * l_t, mask=i < n, other=0.0).to(tl.float32)
        scales_CC = spread_scales(
            scales, own, level_LC, sibling_CC, C, LOG_C, DOT, PRECISION, level_scales.dtype.element_ty == DOT
        )
        scales_CC *= scale
        # Above the diagonal scales_CC is 0, and the exponential must be finite.
        decay_CC = tl.exp2(tl.minimum(G[:, None] - G[None, :], 0.0))
        dscores_CC += pulled_CC * (decay_CC * scales_CC)
        decay_CC *= scores_CC
        pulled_CC *= decay_CC
        read_CC = (decay_CC * scales_CC).to(DOT)
        for tile in range(TILES):
            if TILES > 1:
                do_CV = load_rows(do_h, o_t, n, tile * BV, C, V, BV).to(DOT)
            dv_CV = tl.dot(tl.trans(read_CC), do_CV, input_precision=PRECISION)
            store_rows(dv + token * dv_t + h * V, dv_t, n, tile * BV, dv_CV, C, V, BV)
        flow_CC = pulled_CC * scales_CC
        tl.store(row_flow + row, tl.load(row_flow + row) + tl.sum(flow_CC, 1))
        tl.store(column_flow + row, tl.sum(flow_CC, 0))
        # dlambda: sums over left siblings, each row's own ones, put into their levels' columns.
        sums_CC = tl.dot(pulled_CC.to(DOT), tl.trans(sibling_CC), input_precision=PRECISION)
        sums_CC = tl.where(is_left_sibling(C, LOG_C), sums_CC, 0.0).to(DOT)
        dscales = tl.dot(sums_CC, tl.trans(level_LC), input_precision=PRECISION)
        diagonal = tl.sum(tl.where(is_diagonal, pulled_CC, 0.0), 1)
        dscales = tl.where(l[None, :] == 0, diagonal[:, None], dscales)
        # Levels from the last on share its column, with the blocks too where the last one lies inside the chunk.
        past = tl.sum(tl.where(l[None, :] >= L - 1, dscales, 0.0), 1)
        dscales = tl.where(l[None, :] == L - 1, past[:, None], dscales) * scale
        to = dlevel_scales + token * dl_t + h * L + (i * dl_t)[:, None] + l[None, :]
        inside = (i < n)[:, None] & (l < tl.minimum(L, LOG_C + 1))[None, :]
        shared = tl.where(L <= LOG_C + 1, L - 1, -1)
        dscales += tl.load(to, mask=inside & (l == shared)[None, :], other=0.0).to(tl.float32)
        tl.store(to, dscales.to(dlevel_scales.dtype.element_ty), mask=inside)
    dscores_low = dscores_CC.to(DOT)
    dk_CK = tl.dot(tl.trans(dscores_low), q_CK, input_precision=PRECISION)
    store_rows(dk + split * plane + (token * groups + group) * K, groups * K, n, 0, dk_CK, C, K, BK)
    to_dq = dq + split * plane + (token * groups + group) * K
    dq_CK = load_rows(to_dq, groups * K, n, 0, C, K, BK)
    dq_CK += tl.dot(dscores_low, k_CK, input_precision=PRECISION)
    store_rows(to_dq, groups * K, n, 0, dq_CK, C, K, BK)
