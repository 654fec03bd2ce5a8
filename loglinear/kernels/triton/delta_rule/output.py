"""What the queries of a chunk read: their own chunk, the blocks of their run, and what was carried to the run.

E  = (Q K^T * dec) Ab            O = (E * LAM) V
X  = diag(exp(G)) Q - E diag(exp(G)) K
from the second half of a chunk to the first, E' = X diag(exp(Gam - G')) K'^T Ab':
                                 O += diag(lambda) E' V',         X <- exp(Gam) X - E' diag(exp(G')) K'
for each older state of the run: O += diag(lambda) X Y[slot]
for each carried state:          O += diag(lambda) X' R[column],  X' = X F
"""

# C chunk, J a half of it (or all of it), H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.delta_rule.tiles import (
    BITS,
    SIZES,
    chunk_scales,
    columns_read,
    count_bits,
    decay,
    load_decays,
    load_strength,
    locate,
    locate_in_run,
    query_products,
    slots_read,
)
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import head_program, load_block, load_rows, store_rows
from loglinear.kernels.triton.walks import nearest


@triton.jit
def minus_keys(x, across, weights_JJ, k_rows, k_t, n, K: tl.constexpr, J: tl.constexpr, TK: tl.constexpr,
               MATH: tl.constexpr):  # fmt: skip
    """X across - weights K, in tiles of TK columns."""
    new = ()
    for t in tl.static_range((K + TK - 1) // TK):
        k_JT = load_rows(k_rows, k_t, n, t * TK, J, K, TK).to(weights_JJ.dtype)
        x_JT = x[t].to(tl.float32) * across - tl.dot(weights_JJ, k_JT, input_precision=MATH.precision)
        new = new + (x_JT.to(weights_JJ.dtype),)
    return new


@triton.jit
def through_state(x, state, tile, K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
                  MATH: tl.constexpr):  # fmt: skip
    """X S, one tile of V."""
    y_JV = tl.dot(x[0], load_block(state, 0, tile * BV, K, V, TK, BV), input_precision=MATH.precision)
    for t in tl.static_range(1, (K + TK - 1) // TK):
        y_JV = tl.dot(x[t], load_block(state, t * TK, tile * BV, K, V, TK, BV), y_JV, input_precision=MATH.precision)
    return y_JV


@triton.jit
def through_prefix(x, prefix, log_decay, K: tl.constexpr, TK: tl.constexpr, MATH: tl.constexpr):
    """X F."""
    new = ()
    for j in tl.static_range((K + TK - 1) // TK):
        y_JT = x[j].to(tl.float32) * tl.exp2(log_decay)
        for t in tl.static_range((K + TK - 1) // TK):
            y_JT = tl.dot(x[t], load_block(prefix, t * TK, j * TK, K, K, TK, TK), y_JT, input_precision=MATH.precision)
        new = new + (y_JT.to(MATH.dot),)
    return new


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    q, k, v, beta, level_scales, inverse, cumulative, kept, prefixes, prefix_totals, carried, out, table, first_runs,
    T, N, H, R, L, scale, num_slots, columns,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, l_b, l_t, l_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, J: tl.constexpr, TK: tl.constexpr,
    BV: tl.constexpr, LINEAR: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One half of a chunk, one head, one tile of V."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    HALVES: tl.constexpr = C // J
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    tile, h, number = head_program(TILES, H)
    half, c = number % HALVES, (number // HALVES).to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    first += half * J
    n = tl.minimum(end - first, J).to(tl.int32)
    if n <= 0:
        return
    i, row = tl.arange(0, J), c * H + h
    scales = level_scales + b * l_b + first * l_t + h * l_h
    q_rows, k_rows = q + b * q_b + first * q_t + (h // R) * q_h, k + b * k_b + first * k_t + (h // R) * k_h
    v_rows, beta_rows = v + b * v_b + first * v_t + h * v_h, beta + b * beta_b + first * beta_t + h * beta_h
    cumulative += row * C
    G = tl.load(cumulative + half * J + i)
    if half > 0:
        G -= tl.load(cumulative + J - 1)
    scores_JJ = query_products(q_rows, k_rows, q_t, k_t, n, n, K, J, J, TK, MATH)
    scores_JJ = (scores_JJ * (decay(G, G, i, J) * scale)).to(MATH.dot)
    inverse_JJ = load_block(inverse + row * (C * C), half * J, half * J, C, C, J, J)
    effective_JJ = tl.dot(scores_JJ, inverse_JJ, input_precision=MATH.precision)
    effective_JJ *= load_strength(beta_rows, beta_t, n, J)[None, :]
    x = ()
    for t in tl.static_range(0, K, TK):
        x = x + (load_rows(q_rows, q_t, n, t, J, K, TK),)
    from_start, weights_JJ = tl.exp2(G), (effective_JJ * tl.exp2(G)[None, :]).to(MATH.dot)
    x = minus_keys(x, from_start[:, None] * scale, weights_JJ, k_rows, k_t, n, K, J, TK, MATH)
    effective_JJ *= chunk_scales(scales, l_t, n, L, i, DTYPE, J, LINEAR, MATH)
    v_JV = load_rows(v_rows, v_t, n, tile * BV, J, V, BV).to(MATH.dot)
    out_JV = tl.dot(effective_JJ.to(MATH.dot), v_JV, input_precision=MATH.precision)
    if half > 0:
        G, total = load_decays(cumulative, J)
        k_rows -= J * k_t
        scores_JJ = tl.zeros([J, J], tl.float32)
        for t in tl.static_range((K + TK - 1) // TK):
            k_JT = load_rows(k_rows, k_t, J, t * TK, J, K, TK).to(MATH.dot)
            scores_JJ = tl.dot(x[t], tl.trans(k_JT), scores_JJ, input_precision=MATH.precision)
        scores_JJ = (scores_JJ * tl.exp2(total - G)[None, :]).to(MATH.dot)
        inverse_JJ = load_block(inverse + row * (C * C), 0, 0, C, C, J, J)
        effective_JJ = tl.dot(scores_JJ, inverse_JJ, input_precision=MATH.precision)
        effective_JJ *= load_strength(beta_rows - J * beta_t, beta_t, J, J)[None, :]
        weight = prefetched(load_scale(scales, l_t, n, LOG_C, L, i), DTYPE)
        v_JV = load_rows(v_rows - J * v_t, v_t, J, tile * BV, J, V, BV).to(MATH.dot)
        out_JV = tl.dot((effective_JJ * weight[:, None]).to(MATH.dot), v_JV, out_JV, input_precision=MATH.precision)
        weights_JJ = (effective_JJ * tl.exp2(G)[None, :]).to(MATH.dot)
        x = minus_keys(x, tl.exp2(total), weights_JJ, k_rows, k_t, J, K, J, TK, MATH)

    place, start, run = locate_in_run(z, z0, sequence, first_runs, N, PACKED)
    reads = slots_read(place, num_slots)
    kept += (c * num_slots * H + h) * (K * V)
    for _ in range(count_bits(reads)):
        slot = nearest(reads)
        reads &= reads - 1
        weight = prefetched(load_scale(scales, l_t, n, slot + (LOG_C + 1), L, i), DTYPE)
        out_JV += weight[:, None] * through_state(x, kept + slot.to(tl.int64) * H * (K * V), tile, K, V, TK, BV, MATH)
    reads = columns_read(z >> BITS, columns, NODES)
    if (reads > 0) & (place > start):
        x = through_prefix(x, prefixes + row * (K * K), tl.load(prefix_totals + row), K, TK, MATH)
    carried += (run * columns * H + h) * (K * V)
    for _ in range(count_bits(reads)):
        column = nearest(reads)
        reads &= reads - 1
        weight = prefetched(load_scale(scales, l_t, n, column + (LOG_C + 1 + BITS), L, i), DTYPE)
        out_JV += weight[:, None] * through_state(
            x, carried + column.to(tl.int64) * H * (K * V), tile, K, V, TK, BV, MATH
        )
    token = b * T + first
    store_rows(out + (token * H + h) * V, H * V, n, tile * BV, out_JV, J, V, BV)
