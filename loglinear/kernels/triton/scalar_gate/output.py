"""What the queries of a chunk read: their own chunk, and the blocks before it.

O = ((Q K^T * dec) * LAM) V + sum over the walk's blocks of diag(lambda_l exp(G) P_path) (Q S_block)
"""

# C chunk, J columns of the chunk at a time, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.tiles import (
    READS,
    SIZES,
    column_of,
    exponent,
    head_program,
    in_chunk_levels,
    load_in_chunk_scales,
    load_read_scales,
    load_rows,
    load_state,
    locate,
    paths,
    slot_pointer,
    store_rows,
)


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    q, k, v, level_scales, cumulative, slots, nodes, log_p, out, table,
    T, N, H, R, L, cap, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, l_b, l_t, l_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, J: tl.constexpr, LOG_C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One chunk, one head, one tile of V; heads are the fastest axis, so that neighbours share keys and states."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, chunk = head_program(TILES, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    i = tl.arange(0, C)
    q_CK = load_rows(q + b * q_b + first * q_t + (h // R) * q_h, q_t, n, 0, C, K, BK).to(DOT)
    G = tl.load(cumulative + (c * H + h) * C + i)
    scales = level_scales + b * l_b + first * l_t + h * l_h
    in_scales = load_in_chunk_scales(scales, l_t, n, L, scale, C, LEVELS)
    read, path = paths(log_p, c, z, z0, cap, h, H)
    read_weights = load_read_scales(scales, l_t, n, read, L, scale, C, LOG_C)
    read_weights *= tl.exp2(G[:, None] + path[None, :])

    k_chunk, v_chunk = k + b * k_b + first * k_t + (h // R) * k_h, v + b * v_b + first * v_t + h * v_h
    out_CV = tl.zeros([C, BV], tl.float32)
    for first_j in tl.static_range(0, C, J):
        j = first_j + tl.arange(0, J)
        k_JK = load_rows(k_chunk + first_j * k_t, k_t, n - first_j, 0, J, K, BK).to(DOT)
        v_JV = load_rows(v_chunk + first_j * v_t, v_t, n - first_j, tile * BV, J, V, BV).to(DOT)
        scores_CJ = tl.dot(q_CK, tl.trans(k_JK), input_precision=PRECISION)
        G_j = tl.load(cumulative + (c * H + h) * C + j)
        weights_CJ = tl.gather(in_scales, in_chunk_levels(i, j), 1) * tl.exp2(G[:, None] - G_j[None, :])
        scores_CJ *= tl.where(i[:, None] >= j[None, :], weights_CJ, 0.0)
        out_CV += tl.dot(scores_CJ.to(DOT), v_JV, input_precision=PRECISION)

    remaining = tl.sum(tl.where(read, 1 << tl.arange(0, READS), 0), 0)
    for _ in range(tl.sum(read.to(tl.int32), 0)):
        l = exponent(remaining & -remaining)
        remaining &= remaining - 1
        state = slot_pointer(slots, nodes, c, z, z0, sequence, l, cap, h, H, K * V, NODES)
        state_KV = load_state(state, tile * BV, K, V, BK, BV)
        out_CV += column_of(read_weights, l)[:, None] * tl.dot(q_CK, state_KV, input_precision=PRECISION)
    # [tokens, H, V], contiguous
    token = b * T + first
    store_rows(out + (token * H + h) * V, H * V, n, tile * BV, out_CV, C, V, BV)
