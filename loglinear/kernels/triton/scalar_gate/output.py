"""What the queries of a chunk read: their own chunk, and the blocks before it.

O = ((Q K^T * dec) * LAM) V + sum over the walk's blocks of diag(lambda_l exp(G) P_path) (Q S_block)
"""

# C chunk, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.levels import far_classes, load_class_scales, load_scale, near_classes, spread_scales
from loglinear.kernels.triton.tiles import SIZES, arrived, head_program, load_rows, load_state, locate, store_rows
from loglinear.kernels.triton.walks import READS, load_blocks, nearest, path_of, slot_pointer, walk


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    q, k, v, level_scales, cumulative, slots, nodes, log_p, out, table,
    T, N, H, R, L, cap, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, l_b, l_t, l_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, HALVES: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LINEAR: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One half of a chunk, one head, one tile of V; heads are the fastest axis, so that neighbours share keys."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    ROWS: tl.constexpr = C // HALVES
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    tile, h, part = head_program(TILES, H)
    half, c = part % HALVES, (part // HALVES).to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    first += half * ROWS
    n = tl.minimum(end - first, ROWS).to(tl.int32)
    if n <= 0:
        return
    i = tl.arange(0, ROWS)
    scales, row = level_scales + b * l_b + first * l_t + h * l_h, (c * H + h) * C + half * ROWS
    k_rows, v_rows = k + b * k_b + first * k_t + (h // R) * k_h, v + b * v_b + first * v_t + h * v_h
    q_CK = load_rows(q + b * q_b + first * q_t + (h // R) * q_h, q_t, n, 0, ROWS, K, BK).to(DOT)
    k_CK = load_rows(k_rows, k_t, n, 0, ROWS, K, BK).to(DOT)
    v_CV = load_rows(v_rows, v_t, n, tile * BV, ROWS, V, BV).to(DOT)
    G = tl.load(cumulative + row + i)
    lambdas = load_class_scales(scales, l_t, n, L, 0, i, LINEAR)
    read, end_of_blocks, are_nodes = walk(z, z0, cap)
    log_block = load_blocks(log_p, c, z, z0, cap, h, H)
    remaining = tl.sum(tl.where(read, 1 << tl.arange(0, READS), 0), 0)
    # lambda of a block is loaded one read ahead.
    ahead = load_scale(scales, l_t, n, LOG_C + 1 + nearest(remaining), L, i)

    near_JC, far_JC = near_classes(ROWS).to(tl.float32).to(DOT), far_classes(ROWS).to(tl.float32).to(DOT)
    weights_CC = spread_scales(lambdas, near_JC, far_JC, i, DTYPE, ROWS, LINEAR, DOT, PRECISION) * scale
    weights_CC = weights_CC * tl.where(i[:, None] >= i[None, :], tl.exp2(G[:, None] - G[None, :]), 0.0)
    weights_CC *= tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION)
    out_CV = tl.dot(weights_CC.to(DOT), v_CV, input_precision=PRECISION)
    if half > 0:
        # The second half reads all of the first at one level; exp(G_i - G_j) through the end of the first.
        before = cumulative + row - ROWS
        between = tl.load(before + ROWS - 1)
        weight = arrived(load_scale(scales, l_t, n, LOG_C, L, i), DTYPE) * scale * tl.exp2(G - between)
        to_end = tl.exp2(between - tl.load(before + i))
        k_before = load_rows(k_rows - ROWS * k_t, k_t, ROWS, 0, ROWS, K, BK).to(DOT)
        v_before = load_rows(v_rows - ROWS * v_t, v_t, ROWS, tile * BV, ROWS, V, BV).to(DOT)
        scores_CC = tl.dot(q_CK, tl.trans(k_before), input_precision=PRECISION)
        scores_CC *= weight[:, None] * to_end[None, :]
        out_CV = tl.dot(scores_CC.to(DOT), v_before, out_CV, input_precision=PRECISION)

    for _ in range(tl.sum(read.to(tl.int32), 0)):
        l = nearest(remaining)
        remaining &= remaining - 1
        weight = arrived(ahead, DTYPE) * scale * tl.exp2(G + path_of(l, log_block))
        ahead = load_scale(scales, l_t, n, LOG_C + 1 + nearest(remaining), L, i)
        state = slot_pointer(slots, nodes, c, z, z0, sequence, l, cap, h, H, K * V, NODES)
        state_KV = load_state(state, tile * BV, K, V, BK, BV)
        out_CV += weight[:, None] * tl.dot(q_CK, state_KV, input_precision=PRECISION)
    # [tokens, H, V], contiguous
    token = b * T + first
    store_rows(out + (token * H + h) * V, H * V, n, tile * BV, out_CV, ROWS, V, BV)
