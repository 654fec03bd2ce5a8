"""Everything that stays inside a chunk, differentiated: what was written, and the keys.

    S = Q K^T * dec,   T = S A,   A = (I + N)^-1,   N = tril(diag(b) K K^T * dec, -1),   Kd = diag(exp(Gam - G)) K
    M = [V | -diag(exp(G)) K],   R = diag(b) M,   U = A R
    O = (T * LAM) R_V,   X = diag(exp(G)) Q + T R_K,   [S_z | P_z] = Kd^T U + [0 | exp(Gam) I]

The writes, in tiles of columns of [V | K], which are treated alike, and what the chunk's end gives to its keys,

    dR = A^T Kd [dS_z | dP_z] + [(T * LAM)^T dO | T^T dX],   dM = diag(b) dR,   db = rowsum(dR * M)
    dKd = U [dS_z | dP_z]^T

What A is multiplied with gives dN = -A^T dA A^T, which has A^T (Kd [dS_z | dP_z]) U^T = A^T (Kd dKd^T) in it,

    dN = -tril(T^T dS + A^T (Kd dKd^T), -1)
    dK = diag(exp(Gam - G)) dKd - diag(b exp(G)) dR_K + (dN' + dN'^T) K + (dS * dec)^T Q,   dN' = diag(b) dN * dec

A chunk of 128 is two parts of 64 tokens; tiles above the diagonal are neither computed nor read.
"""

# C chunk, J tokens of a part, H heads, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.in_chunk import load_part, load_tile, multiply_rows
from loglinear.kernels.triton.delta_rule.tiles import SIZES, decay, load_decays, load_strength, locate, part_program
from loglinear.kernels.triton.tiles import MIN_LOG_DECAY, head_program, load_block, load_rows, store_block, store_rows


@triton.jit
def load_lower(matrix, C: tl.constexpr):
    """A lower triangular [C, C] matrix, of which nothing is read in the tile of 64 above the diagonal."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if C <= 64:
        return tl.load(matrix + (i * C + j))
    else:
        return tl.load(matrix + (i * C + j), mask=i // 64 >= j // 64, other=0.0)


@triton.jit
def dwrites_tile(
    k_rows, k_t, n, to_end, inverse, dstate, weights, g_rows, g_t, column,
    WIDTH: tl.constexpr, K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """dR = A^T Kd dstate + weights^T g of one tile of columns."""
    dwrite_CV = tl.zeros([C, BV], tl.float32)
    for t in range(0, K, TK):
        k_CT = load_rows(k_rows, k_t, n, t, C, K, TK).to(MATH.dot)
        dstate_TV = load_block(dstate, t, column, K, WIDTH, TK, BV)
        dwrite_CV = tl.dot(k_CT, dstate_TV, dwrite_CV, input_precision=MATH.precision)
    dwrite_CV = (dwrite_CV * to_end[:, None]).to(MATH.dot)
    dr_CV = tl.dot(tl.trans(load_lower(inverse, C)), dwrite_CV, input_precision=MATH.precision)
    g_CV = load_rows(g_rows, g_t, n, column, C, WIDTH, BV).to(MATH.dot)
    return tl.dot(tl.trans(load_lower(weights, C)), g_CV, dr_CV, input_precision=MATH.precision)


@triton.jit
def add_written(
    dkeys_CT, inverse_CC, m_rows, m_t, n, weight, dstate, t,
    WIDTH: tl.constexpr, K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """dKd + U dstate^T, one tile of the keys' columns. U first: where keys come again it is small."""
    for column in range(0, WIDTH, BV):
        m_CV = load_rows(m_rows, m_t, n, column, C, WIDTH, BV).to(tl.float32) * weight[:, None]
        write_CV = tl.dot(inverse_CC, m_CV.to(MATH.dot), input_precision=MATH.precision).to(MATH.dot)
        dstate_TV = load_block(dstate, t, column, K, WIDTH, TK, BV)
        dkeys_CT = tl.dot(write_CV, tl.trans(dstate_TV), dkeys_CT, input_precision=MATH.precision)
    return dkeys_CT


@triton.jit(do_not_specialize=SIZES)
def writes_backward_kernel(
    k, v, beta, cumulative, inverse, effective, weights, dslots, dtransitions, dseen, do,
    dkeys, dk, dv, sums, table,
    T, N, H, R,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, o_b, o_t, o_h, dk_t, dv_t, a_c,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head, one tile of columns: of [R_K | R_V], or of dKd, dkeys [chunk, H, C, K]. R_V gives dv
    [B, T, H, V], R_K its part of dk [B, T, H, K], and each of their tiles a share of beta's gradient, sums
    [chunk, H, tile, C]."""
    KEY_TILES: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = KEY_TILES + (V + BV - 1) // BV
    tile, h, chunk = head_program(TILES + KEY_TILES, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    row, token = c * H + h, b * T + first
    k_rows, v_rows = k + b * k_b + first * k_t + (h // R) * k_h, v + b * v_b + first * v_t + h * v_h
    strength = load_strength(beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n, C)
    G, total = load_decays(cumulative + row * C, C)
    to_end = tl.exp2(total - G)
    inverse += c * a_c + h * (C * C)
    effective, weights = effective + row * (C * C), weights + row * (C * C)
    dslots, dtransitions = dslots + row * (K * V), dtransitions + row * (K * K)
    sums += (row * TILES + tile) * C + tl.arange(0, C)
    if tile < KEY_TILES:
        t = tile * TK
        dr_CT = dwrites_tile(
            k_rows, k_t, n, to_end, inverse, dtransitions, effective, dseen + row * (C * K), K, t,
            K, K, C, TK, TK, MATH,
        ) * -tl.exp2(G)[:, None]  # fmt: skip
        k_CT = load_rows(k_rows, k_t, n, t, C, K, TK).to(tl.float32)
        tl.store(sums, tl.sum(dr_CT * k_CT, 1))
        store_rows(dk + token * dk_t + h * K, dk_t, n, t, dr_CT * strength[:, None], C, K, TK)
    elif tile < TILES:
        column = (tile - KEY_TILES) * BV
        dr_CV = dwrites_tile(
            k_rows, k_t, n, to_end, inverse, dslots, weights, do + b * o_b + first * o_t + h * o_h, o_t, column,
            V, K, C, TK, BV, MATH,
        )  # fmt: skip
        v_CV = load_rows(v_rows, v_t, n, column, C, V, BV).to(tl.float32)
        tl.store(sums, tl.sum(dr_CV * v_CV, 1))
        store_rows(dv + token * dv_t + h * V, dv_t, n, column, dr_CV * strength[:, None], C, V, BV)
    else:
        t = (tile - TILES) * TK
        inverse_CC, dkeys_CT = load_lower(inverse, C), tl.zeros([C, TK], tl.float32)
        dkeys_CT = add_written(
            dkeys_CT, inverse_CC, k_rows, k_t, n, -strength * tl.exp2(G), dtransitions, t,
            K, K, C, TK, TK, MATH,
        )  # fmt: skip
        dkeys_CT = add_written(dkeys_CT, inverse_CC, v_rows, v_t, n, strength, dslots, t, V, K, C, TK, BV, MATH)
        store_block(dkeys + row * (C * K), 0, t, dkeys_CT, C, K, C, TK)


@triton.jit
def key_flows(
    k_rows, k_t, n, to_end, dkeys,
    K: tl.constexpr, J: tl.constexpr, TK: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Kd dKd^T of J tokens each. dKd is float32: where a key comes again, what it has along that key is a small part of
    it, less than it would be rounded by."""
    products_JJ = tl.zeros([J, J], tl.float32)
    for column in range(0, K, TK):
        k_JT = load_rows(k_rows, k_t, n, column, J, K, TK).to(MATH.dot)
        dkeys_JT = load_rows(dkeys, K, J, column, J, K, TK)
        high_JT = dkeys_JT.to(MATH.dot)
        products_JJ = tl.dot(k_JT, tl.trans(high_JT), products_JJ, input_precision=MATH.precision)
        if MATH.dot == tl.bfloat16:
            low_JT = (dkeys_JT - high_JT.to(tl.float32)).to(MATH.dot)
            products_JJ = tl.dot(k_JT, tl.trans(low_JT), products_JJ)
    return products_JJ * to_end[:, None]


@triton.jit
def lower_part(
    arguments, K: tl.constexpr, C: tl.constexpr, J: tl.constexpr, TK: tl.constexpr,
    KEY_TILES: tl.constexpr, VALUE_TILES: tl.constexpr,
    EARLIER: tl.constexpr, LATER: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """A part of n tokens, in a chunk of n_keys. EARLIER, LATER: there is one before it, behind it."""
    (
        k_rows, k_t, n, n_keys, beta, beta_t, cumulative, inverse, effective, dscores, dkeys, dlower, sums,
        flow, held, shares, dbeta_rows, db_t,
    ) = arguments  # fmt: skip
    own: tl.constexpr = J if EARLIER else 0
    i, own_rows = tl.arange(0, J), k_rows + own * k_t
    G, total = load_part(cumulative, own, J), tl.load(cumulative + (C - 1))
    strength, to_end = load_strength(beta + own * beta_t, beta_t, n, J), tl.exp2(total - G)

    dstrength, flows = tl.zeros([J], tl.float32), tl.load(flow + own + i)
    for tile in tl.static_range(KEY_TILES):
        dstrength += tl.load(sums + tile * C + own + i)
    flows += dstrength * strength
    for tile in tl.static_range(VALUE_TILES):
        dstrength += tl.load(sums + (KEY_TILES + tile) * C + own + i)

    # The tile of dN on the diagonal. What is above the diagonal of the products would give nothing below it; without it
    # the compiler finds 25 registers fewer.
    products_JJ = key_flows(own_rows, k_t, n, to_end, dkeys + own * K, K, J, TK, MATH)
    tl.store(held + own + i, tl.sum(tl.where(i[:, None] == i[None, :], products_JJ, 0.0), 1))
    products_JJ = tl.where(i[:, None] >= i[None, :], products_JJ, 0.0).to(MATH.dot)
    dlower_JJ = tl.dot(tl.trans(load_tile(inverse, own, own, C, J)), products_JJ, input_precision=MATH.precision)
    effective_JJ, dscores_JJ = load_tile(effective, own, own, C, J), load_tile(dscores, own, own, C, J)
    dlower_JJ = tl.dot(tl.trans(effective_JJ), dscores_JJ, dlower_JJ, input_precision=MATH.precision)
    if LATER:
        later_rows, n_later = k_rows + J * k_t, n_keys - J
        to_end = tl.exp2(total - load_part(cumulative, J, J))
        products_JJ = key_flows(later_rows, k_t, n_later, to_end, dkeys, K, J, TK, MATH)
        inverse_JJ = tl.trans(load_tile(inverse, J, 0, C, J))
        dlower_JJ = tl.dot(inverse_JJ, products_JJ.to(MATH.dot), dlower_JJ, input_precision=MATH.precision)
        effective_JJ, dscores_JJ = load_tile(effective, J, 0, C, J), load_tile(dscores, J, 0, C, J)
        dlower_JJ = tl.dot(tl.trans(effective_JJ), dscores_JJ, dlower_JJ, input_precision=MATH.precision)
    dlower_JJ *= -tl.where(i[:, None] > i[None, :], decay(G, G, i, J), 0.0)
    store_block(dlower, own, own, dlower_JJ * strength[:, None], C, C, J, J)
    dlower_JJ *= multiply_rows(own_rows, own_rows, k_t, k_t, n, n, K, J, TK, MATH)
    dstrength += tl.sum(dlower_JJ, 1)
    dlower_JJ *= strength[:, None]
    flows += tl.sum(dlower_JJ, 1)
    tl.store(shares + own + i, tl.sum(dlower_JJ, 0))

    if EARLIER:  # the tile on its left
        n_first = tl.minimum(n_keys, J)
        products_JJ = key_flows(own_rows, k_t, n, to_end, dkeys, K, J, TK, MATH)
        inverse_JJ = tl.trans(load_tile(inverse, own, own, C, J))
        dlower_JJ = tl.dot(inverse_JJ, products_JJ.to(MATH.dot), input_precision=MATH.precision)
        effective_JJ, dscores_JJ = load_tile(effective, own, own, C, J), load_tile(dscores, own, 0, C, J)
        dlower_JJ = tl.dot(tl.trans(effective_JJ), dscores_JJ, dlower_JJ, input_precision=MATH.precision)
        dlower_JJ *= -tl.exp2(G[:, None] - load_part(cumulative, 0, J)[None, :])
        store_block(dlower, own, 0, dlower_JJ * strength[:, None], C, C, J, J)
        dlower_JJ *= multiply_rows(own_rows, k_rows, k_t, k_t, n, n_first, K, J, TK, MATH)
        dstrength += tl.sum(dlower_JJ, 1)
        dlower_JJ *= strength[:, None]
        flows += tl.sum(dlower_JJ, 1)
        tl.store(shares + i, tl.sum(dlower_JJ, 0))
    tl.store(flow + own + i, flows)
    tl.store(dbeta_rows + i * db_t, dstrength.to(dbeta_rows.dtype.element_ty), mask=i < n)


@triton.jit(do_not_specialize=SIZES)
def lower_backward_kernel(
    k, beta, cumulative, inverse, effective, dscores, dkeys, sums,
    dlower, flow, held, shares, dbeta, table,
    T, N, H, R,
    k_b, k_t, k_h, beta_b, beta_t, beta_h, db_t, a_c,
    K: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, TK: tl.constexpr,
    KEY_TILES: tl.constexpr, VALUE_TILES: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """C / PARTS rows of one chunk, one head: dN' [chunk, H, C, C], dbeta; adds to the decays' flow [chunk, H, C], of
    which shares [chunk, H, 1, part, C] are the columns'; held [chunk, H, C] flows from a token to the chunk's end."""
    J: tl.constexpr = C // PARTS
    h, c, b, first, z, z0, sequence, n_keys, own, n = part_program(table, T, N, H, C, PARTS, PACKED)
    if n <= 0:
        return
    row = c * H + h
    k_rows, beta = k + b * k_b + first * k_t + (h // R) * k_h, beta + b * beta_b + first * beta_t + h * beta_h
    inverse, effective = inverse + c * a_c + h * (C * C), effective + row * (C * C)
    dscores, dlower, dkeys = dscores + row * (C * C), dlower + row * (C * C), dkeys + row * (C * K)
    cumulative, flow, held = cumulative + row * C, flow + row * C, held + row * C
    shares, sums = shares + (row * (2 * PARTS) + PARTS + own // J) * C, sums + row * ((KEY_TILES + VALUE_TILES) * C)
    arguments = (
        k_rows, k_t, n, n_keys, beta, beta_t, cumulative, inverse, effective, dscores, dkeys, dlower, sums,
        flow, held, shares, dbeta + (b * T + first + own) * db_t + h, db_t,
    )  # fmt: skip
    if own == 0:
        lower_part(arguments, K, C, J, TK, KEY_TILES, VALUE_TILES, False, PARTS > 1, MATH)
    elif PARTS > 1:
        lower_part(arguments, K, C, J, TK, KEY_TILES, VALUE_TILES, True, False, MATH)


@triton.jit
def keys_part(
    arguments, K: tl.constexpr, C: tl.constexpr, J: tl.constexpr, TK: tl.constexpr,
    EARLIER: tl.constexpr, LATER: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """A part of n tokens, in a chunk of n_keys. EARLIER, LATER: there is one before it, behind it."""
    q_rows, q_t, k_rows, k_t, n, n_keys, cumulative, dscores, dkeys, dlower, dk_rows, dk_t, t, scale = arguments
    own: tl.constexpr = J if EARLIER else 0
    i, n_first, n_later = tl.arange(0, J), tl.minimum(n_keys, J), n_keys - J
    G = load_part(cumulative, own, J)
    to_end = tl.exp2(tl.load(cumulative + (C - 1)) - G)
    dk_JT = load_block(dkeys, own, t, C, K, J, TK).to(tl.float32) * to_end[:, None]
    dk_JT += load_rows(dk_rows, dk_t, n, t, J, K, TK).to(tl.float32)
    k_JT, dlower_JJ = load_rows(k_rows + own * k_t, k_t, n, t, J, K, TK).to(MATH.dot), load_tile(dlower, own, own, C, J)
    dk_JT = tl.dot(dlower_JJ, k_JT, dk_JT, input_precision=MATH.precision)
    dlower_JJ = tl.trans(load_tile(dlower, own, own, C, J, t))  # again, and not kept: registers for one program more
    dk_JT = tl.dot(dlower_JJ, k_JT, dk_JT, input_precision=MATH.precision)
    dscores_JJ = load_tile(dscores, own, own, C, J).to(tl.float32) * (decay(G, G, i, J) * scale)
    q_JT = load_rows(q_rows + own * q_t, q_t, n, t, J, K, TK).to(MATH.dot)
    dk_JT = tl.dot(tl.trans(dscores_JJ.to(MATH.dot)), q_JT, dk_JT, input_precision=MATH.precision)
    if EARLIER:
        k_JT = load_rows(k_rows, k_t, n_first, t, J, K, TK).to(MATH.dot)
        dk_JT = tl.dot(load_tile(dlower, own, 0, C, J), k_JT, dk_JT, input_precision=MATH.precision)
    if LATER:
        k_JT = load_rows(k_rows + J * k_t, k_t, n_later, t, J, K, TK).to(MATH.dot)
        dk_JT = tl.dot(tl.trans(load_tile(dlower, J, 0, C, J)), k_JT, dk_JT, input_precision=MATH.precision)
        crossing = tl.exp2(load_part(cumulative, J, J)[:, None] - G[None, :]) * scale
        dscores_JJ = load_tile(dscores, J, 0, C, J).to(tl.float32) * crossing
        q_JT = load_rows(q_rows + J * q_t, q_t, n_later, t, J, K, TK).to(MATH.dot)
        dk_JT = tl.dot(tl.trans(dscores_JJ.to(MATH.dot)), q_JT, dk_JT, input_precision=MATH.precision)
    store_rows(dk_rows, dk_t, n, t, dk_JT, J, K, TK)


@triton.jit(do_not_specialize=SIZES)
def keys_backward_kernel(
    q, k, cumulative, dscores, dkeys, dlower, dk, table,
    T, N, H, R, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, dk_t,
    K: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, TK: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """C / PARTS tokens of one chunk, one head, one tile of columns: adds to dk [B, T, H, K] what dKd, dN' and dS
    give."""
    J: tl.constexpr = C // PARTS
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile, h, number = head_program(TILES * PARTS, H)
    part, c = tile // TILES, number.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n_keys, own, t = tl.minimum(end - first, C).to(tl.int32), part * J, tile % TILES * TK
    n = tl.minimum(n_keys - own, J)
    if n <= 0:
        return
    row = c * H + h
    q_rows, k_rows = q + b * q_b + first * q_t + (h // R) * q_h, k + b * k_b + first * k_t + (h // R) * k_h
    arguments = (
        q_rows, q_t, k_rows, k_t, n, n_keys, cumulative + row * C,
        dscores + row * (C * C), dkeys + row * (C * K), dlower + row * (C * C),
        dk + (b * T + first + own) * dk_t + h * K, dk_t, t, scale,
    )  # fmt: skip
    if own == 0:
        keys_part(arguments, K, C, J, TK, False, PARTS > 1, MATH)
    elif PARTS > 1:
        keys_part(arguments, K, C, J, TK, True, False, MATH)


@triton.jit(do_not_specialize=SIZES)
def decay_backward_kernel(
    log_decay, cumulative, dtransitions, flow, held, shares, dlog_decay, table,
    T, N, H,
    g_b, g_t, g_h, dg_t,
    K: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, TK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head: dlog_decay [B, T, H]. G_i is a sum over the tokens up to i: a token decays what flows into
    it and into later ones, what earlier ones have written until the chunk's end, and exp(Gam) I of the transition."""
    _, h, chunk = head_program(1, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    i, row = tl.arange(0, C), c * H + h
    inside = i < n
    _, total = load_decays(cumulative + row * C, C)
    crossing = tl.zeros([], tl.float32)
    for t in range(0, K, TK):
        x = t + tl.arange(0, TK)
        diagonal = dtransitions + row * (K * K) + x * (K + 1)
        crossing += tl.sum(tl.load(diagonal, mask=x < K, other=0.0).to(tl.float32), 0)
    flows = tl.load(flow + row * C + i, mask=inside, other=0.0)
    for plane in tl.static_range(2 * PARTS):  # of a part that has tokens, of those up to its last one
        is_read = inside & (n > plane % PARTS * (C // PARTS)) & (i < (plane % PARTS + 1) * (C // PARTS))
        flows -= tl.load(shares + (row * (2 * PARTS) + plane) * C + i, mask=is_read, other=0.0)
    given = tl.load(held + row * C + i, mask=inside, other=0.0)
    dg = tl.cumsum(flows, 0, reverse=True) + (tl.cumsum(given, 0) - given) + crossing * tl.exp2(total)
    g = tl.load(log_decay + b * g_b + first * g_t + h * g_h + i * g_t, mask=inside, other=0.0).to(tl.float32)
    dg = tl.where(g < MIN_LOG_DECAY, 0.0, dg)
    tl.store(dlog_decay + (b * T + first) * dg_t + h + i * dg_t, dg.to(dlog_decay.dtype.element_ty), mask=inside)
