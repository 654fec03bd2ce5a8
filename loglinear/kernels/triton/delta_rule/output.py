"""What the queries of a chunk read: their own chunk, the blocks of their run, and what was carried to the run.

E  = (Q K^T * dec) Ab            O = (E * LAM) V
X  = diag(exp(G)) Q - E diag(exp(G)) K
from the second half of a chunk to the first, E' = X diag(exp(Gam - G')) K'^T Ab':
                                 O += diag(lambda) E' V',         X <- exp(Gam) X - E' diag(exp(G')) K'
for each block of the run:       O += diag(lambda) X S_block,     X <- X P_block
for each carried state:          O += diag(lambda) X R
"""

# C rows of one half (or the whole) of a chunk, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import BITS, RUN, count_bits, decay, load_decays, load_write, reads_of
from loglinear.kernels.triton.levels import far_classes, load_class_scales, load_scale, near_classes, spread_scales
from loglinear.kernels.triton.tiles import SIZES, arrived, head_program, load_block, load_rows, locate, store_rows
from loglinear.kernels.triton.walks import READS, nearest, slot_pointer, walk


@triton.jit
def effective_attention(
    q_rows, k_rows, q_t, k_t, n, G, write_CC, scale,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """E = (Q K^T * dec) Ab, times scale: the coefficient of v_j in o_i."""
    scores_CC = tl.zeros([C, C], tl.float32)
    for kt in tl.static_range(0, K, TK):
        q_CT = load_rows(q_rows, q_t, n, kt, C, K, TK).to(DOT)
        k_CT = load_rows(k_rows, k_t, n, kt, C, K, TK).to(DOT)
        scores_CC = tl.dot(q_CT, tl.trans(k_CT), scores_CC, input_precision=PRECISION)
    scores_CC *= decay(G, C) * scale
    return tl.dot(scores_CC.to(DOT), write_CC, input_precision=PRECISION)


@triton.jit
def seen_by_queries(
    q_rows, k_rows, q_t, k_t, n, G, effective_CC, scale,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X = diag(exp(G)) Q - E diag(exp(G)) K, how queries see an incoming state, in tiles of TK columns."""
    from_start = tl.exp2(G)[:, None]
    effective_CC = effective_CC.to(DOT)
    x = ()
    for kt in tl.static_range(0, K, TK):
        incoming_CT = (load_rows(k_rows, k_t, n, kt, C, K, TK).to(tl.float32) * from_start).to(DOT)
        x_CT = load_rows(q_rows, q_t, n, kt, C, K, TK).to(tl.float32) * (from_start * scale)
        x_CT -= tl.dot(effective_CC, incoming_CT, input_precision=PRECISION)
        x = x + (x_CT.to(DOT),)
    return x


@triton.jit
def through_state(x, state, tile, K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """X S, one tile of V."""
    y_CV = tl.dot(x[0], load_block(state, 0, tile * BV, K, V, TK, BV), input_precision=PRECISION)
    for t in tl.static_range(1, (K + TK - 1) // TK):
        y_CV = tl.dot(x[t], load_block(state, t * TK, tile * BV, K, V, TK, BV), y_CV, input_precision=PRECISION)
    return y_CV


@triton.jit
def through_transition(x, transition, K: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """X P."""
    new = ()
    for j in tl.static_range((K + TK - 1) // TK):
        y_CT = tl.dot(x[0], load_block(transition, 0, j * TK, K, K, TK, TK), input_precision=PRECISION)
        for t in tl.static_range(1, (K + TK - 1) // TK):
            y_CT = tl.dot(x[t], load_block(transition, t * TK, j * TK, K, K, TK, TK), y_CT, input_precision=PRECISION)
        new = new + (y_CT.to(DOT),)
    return new


@triton.jit
def across_halves(
    x, k_rows, k_t, G, total, write_CC,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X diag(exp(Gam - G)) K^T Ab: the coefficients of another half's values for queries that start behind it."""
    to_end = tl.exp2(total - G)[:, None]
    scores_CC = tl.zeros([C, C], tl.float32)
    for t in tl.static_range((K + TK - 1) // TK):
        outgoing_CT = (load_rows(k_rows, k_t, C, t * TK, C, K, TK).to(tl.float32) * to_end).to(DOT)
        scores_CC = tl.dot(x[t], tl.trans(outgoing_CT), scores_CC, input_precision=PRECISION)
    return tl.dot(scores_CC.to(DOT), write_CC, input_precision=PRECISION)


@triton.jit
def through_half(
    x, k_rows, k_t, G, total, effective_CC,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """exp(Gam) X - E diag(exp(G)) K."""
    from_start, across, effective_CC = tl.exp2(G)[:, None], tl.exp2(total), effective_CC.to(DOT)
    new = ()
    for t in tl.static_range((K + TK - 1) // TK):
        incoming_CT = (load_rows(k_rows, k_t, C, t * TK, C, K, TK).to(tl.float32) * from_start).to(DOT)
        x_CT = x[t].to(tl.float32) * across - tl.dot(effective_CC, incoming_CT, input_precision=PRECISION)
        new = new + (x_CT.to(DOT),)
    return new


@triton.jit
def run_row(c, z, z0, sequence, first_runs, N, PACKED: tl.constexpr):
    """The number of the run that chunk z lies in."""
    if PACKED:
        return tl.load(first_runs + sequence) + (z >> BITS) - (z0 >> BITS)
    else:
        return sequence.to(tl.int64) * tl.maximum((N + RUN - 1) >> BITS, 1) + (z >> BITS)


@triton.jit
def carried_columns(reads, cap):
    """The columns of carried states that are read, as bits: candidates from BITS on, all from the cap on in one."""
    high, last = reads >> BITS, tl.minimum(tl.maximum(cap - BITS, 0), READS)
    return (high & ((1 << last) - 1)) | ((high >> last) > 0).to(tl.int32) << last


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    q, k, v, beta, level_scales, inverse, cumulative, transitions, slots, nodes, carried, out, table, first_runs,
    T, N, H, R, L, cap, scale, columns,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, l_b, l_t, l_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, HALVES: tl.constexpr,
    TK: tl.constexpr, BV: tl.constexpr, LINEAR: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One half of a chunk, one head, one tile of V. LOG_C: of the whole chunk."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    tile, h, part = head_program(TILES, H)
    half, c = part % HALVES, (part // HALVES).to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C * HALVES, PACKED)
    first += half * C
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    i, row = tl.arange(0, C), part.to(tl.int64) * H + h
    scales = level_scales + b * l_b + first * l_t + h * l_h
    q_rows, k_rows = q + b * q_b + first * q_t + (h // R) * q_h, k + b * k_b + first * k_t + (h // R) * k_h
    v_rows, beta_rows = v + b * v_b + first * v_t + h * v_h, beta + b * beta_b + first * beta_t + h * beta_h
    G, _ = load_decays(cumulative + row * C, C)
    write_CC = load_write(inverse + row * (C * C), beta_rows, beta_t, n, C, DOT)
    effective_CC = effective_attention(q_rows, k_rows, q_t, k_t, n, G, write_CC, scale, K, C, TK, DOT, PRECISION)
    x = seen_by_queries(q_rows, k_rows, q_t, k_t, n, G, effective_CC, scale, K, C, TK, DOT, PRECISION)
    lambdas = load_class_scales(scales, l_t, n, L, 0, i, LINEAR)
    near_JC, far_JC = near_classes(C).to(tl.float32).to(DOT), far_classes(C).to(tl.float32).to(DOT)
    weights_CC = effective_CC * spread_scales(lambdas, near_JC, far_JC, i, DTYPE, C, LINEAR, DOT, PRECISION)
    weights_CC = tl.where(i[:, None] >= i[None, :], weights_CC, 0.0)
    v_CV = load_rows(v_rows, v_t, n, tile * BV, C, V, BV).to(DOT)
    out_CV = tl.dot(weights_CC.to(DOT), v_CV, input_precision=PRECISION)

    if half > 0:
        before = row - H
        G, total = load_decays(cumulative + before * C, C)
        write_CC = load_write(inverse + before * (C * C), beta_rows - C * beta_t, beta_t, C, C, DOT)
        coefficients_CC = across_halves(x, k_rows - C * k_t, k_t, G, total, write_CC, K, C, TK, DOT, PRECISION)
        weight = arrived(load_scale(scales, l_t, n, LOG_C, L, i), DTYPE)
        v_CV = load_rows(v_rows - C * v_t, v_t, C, tile * BV, C, V, BV).to(DOT)
        weighted_CC = (coefficients_CC * weight[:, None]).to(DOT)
        out_CV = tl.dot(weighted_CC, v_CV, out_CV, input_precision=PRECISION)
        x = through_half(x, k_rows - C * k_t, k_t, G, total, coefficients_CC, K, C, TK, DOT, PRECISION)

    read, end_of_blocks, are_nodes = walk(z, z0, cap, BITS)
    reads = reads_of(read)
    remaining, column_set = reads & (RUN - 1), carried_columns(reads, cap)
    for _ in range(count_bits(remaining)):
        l = nearest(remaining)
        remaining &= remaining - 1
        weight = arrived(load_scale(scales, l_t, n, LOG_C + 1 + l, L, i), DTYPE)
        slot = slot_pointer(slots, nodes, c, z, z0, sequence, l, cap, h, H, K * V, NODES)
        out_CV += weight[:, None] * through_state(x, slot, tile, K, V, TK, BV, PRECISION)
        block_end = (z >> l) << l
        if (block_end > z0) & ((remaining > 0) | (column_set > 0)):
            transition = transitions + (((c - z) + block_end - 1) * H + h) * (K * K)
            x = through_transition(x, transition, K, TK, DOT, PRECISION)
    carried += run_row(c, z, z0, sequence, first_runs, N, PACKED) * columns * H * (K * V)
    for _ in range(count_bits(column_set)):
        column = nearest(column_set)
        column_set &= column_set - 1
        weight = arrived(load_scale(scales, l_t, n, column + (LOG_C + 1 + BITS), L, i), DTYPE)
        state = carried + (column * H + h) * (K * V)
        out_CV += weight[:, None] * through_state(x, state, tile, K, V, TK, BV, PRECISION)
    token = b * T + first
    store_rows(out + (token * H + h) * V, H * V, n, tile * BV, out_CV, C, V, BV)
