"""Everything that stays inside a chunk, differentiated.

    S = Q K^T * dec,   T = S A,   A = (I + N)^-1,   N = tril(diag(b) K K^T * dec, -1),   Kd = diag(exp(Gam - G)) K
    M = [V | -diag(exp(G)) K],   R = diag(b) M,   U = A R
    O = (T * LAM) R_V,   X = diag(exp(G)) Q + T R_K,   [S_z | P_z] = Kd^T U + [0 | exp(Gam) I]

The queries' side, in rows of the chunk,

    dT = (dO V^T * LAM - dX K^T diag(exp(G))) diag(b),   dS = dT A^T,   dQ = (dS * dec) K + diag(exp(G)) dX

and the writes', in tiles of columns of [V | K], which are all treated alike:

    dU = Kd [dS_z | dP_z],   dY = A^T dU,   dR = dY + [(T * LAM)^T dO | T^T dX],   dM = diag(b) dR,   db = rowsum(dR * M)

What A is multiplied with gives dN = -A^T dA A^T, and the keys get

    dN = -tril(T^T dS + dY U^T, -1),   dKd = U [dS_z | dP_z]^T,   rowsum(dKd * Kd) = rowsum(U * dU)

A chunk of 128 is two parts of 64 tokens; tiles above the diagonal are neither computed nor read.
"""

# C chunk, J tokens of a part, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.in_chunk import load_part, load_tile, multiply_rows
from loglinear.kernels.triton.delta_rule.tiles import (
    decay,
    load_decays,
    load_strength,
    part_program,
)
from loglinear.kernels.triton.levels import load_scale, sums_by_level
from loglinear.kernels.triton.tiles import (
    MIN_LOG_DECAY,
    SIZES,
    arrived,
    exponent,
    head_program,
    load_block,
    load_rows,
    locate,
    store_block,
    store_rows,
)


@triton.jit
def load_scales(scales, l_t, n, L, J: tl.constexpr, LINEAR: tl.constexpr):
    """LAM of a part's own J tokens, its lower triangle; scales: of the first of them."""
    i, j = tl.arange(0, J)[:, None], tl.arange(0, J)[None, :]
    at = i * l_t
    if not LINEAR:
        at += tl.minimum(tl.where(i == j, 0, exponent(i ^ j) + 1), L - 1)
    return tl.load(scales + at, mask=(i < n) & (i >= j), other=0.0).to(tl.float32)


@triton.jit
def effective_backward(
    do_rows, o_t, v_rows, v_t, dseen_rows, k_rows, k_t, n, n_columns, strength, G, scales, effective, weights, i, j,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, J: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dT of the tile at (i, j), and what each of its places gives to lambda; stores the tile of T * LAM."""
    pulled_JJ = multiply_rows(do_rows, v_rows, o_t, v_t, n, n_columns, V, J, BV, DOT, PRECISION)
    effective_JJ = load_tile(effective, i, j, C, J).to(tl.float32)
    store_block(weights, i, j, effective_JJ * scales, C, C, J, J)
    pulled_JJ *= strength[None, :]
    given_JJ = pulled_JJ * effective_JJ
    read_JJ = multiply_rows(dseen_rows, k_rows, K, k_t, n, n_columns, K, J, TK, DOT, PRECISION)
    return (pulled_JJ * scales - read_JJ * (strength * tl.exp2(G))[None, :]).to(DOT), given_JJ


@triton.jit
def scores_part(
    arguments, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, J: tl.constexpr, LOG_C: tl.constexpr,
    TK: tl.constexpr, BV: tl.constexpr, EARLIER: tl.constexpr,
    LINEAR: tl.constexpr, DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of n tokens, in a chunk of n_keys. EARLIER: there is one before it."""
    (
        q_rows, q_t, k_rows, k_t, v_rows, v_t, do_rows, o_t, dseen_rows, n, n_keys, beta, beta_t, scales, l_t, L, G,
        inverse, effective, weights, dscores, dq_rows, dq_t, flow, shares, to_dscales, dl_t, scale,
    ) = arguments  # fmt: skip
    own: tl.constexpr = J if EARLIER else 0
    i, last = tl.arange(0, J), L - 1
    own_rows, own_values = k_rows + own * k_t, v_rows + own * v_t
    G_own, n_first = load_part(G, own, J), tl.minimum(n_keys, J)
    across = tl.zeros([J], tl.float32)  # of lambda where the earlier part is read, all of it at one level
    if EARLIER:
        G_first, strength = load_part(G, 0, J), load_strength(beta, beta_t, n_first, J)
        scale_across = arrived(load_scale(scales, l_t, n, LOG_C, L, i), DTYPE)
        deffective_first, given_JJ = effective_backward(
            do_rows, o_t, v_rows, v_t, dseen_rows, k_rows, k_t, n, n_first, strength, G_first, scale_across[:, None],
            effective, weights, own, 0, K, V, C, J, TK, BV, DOT, PRECISION,
        )  # fmt: skip
        across = tl.sum(given_JJ, 1)
    strength = load_strength(beta + own * beta_t, beta_t, n, J)
    deffective_own, given_JJ = effective_backward(
        do_rows, o_t, own_values, v_t, dseen_rows, own_rows, k_t, n, n, strength, G_own,
        load_scales(scales, l_t, n, L, J, LINEAR), effective, weights, own, own,
        K, V, C, J, TK, BV, DOT, PRECISION,
    )  # fmt: skip
    to, inside = to_dscales + i * dl_t, i < n
    if LINEAR:
        held = tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, (held + across + tl.sum(given_JJ, 1)).to(to_dscales.dtype.element_ty), mask=inside)
    else:
        column = tl.arange(0, 16)[None, :]
        sums_JL = sums_by_level(given_JJ, i, L, J, J, LOG_C - EARLIER)
        sums_JL += tl.where(column == tl.minimum(last, LOG_C), across[:, None], 0.0)
        shared = (inside & (last <= LOG_C))[:, None] & (column == last)
        sums_JL += tl.load(to[:, None] + column, mask=shared, other=0.0).to(tl.float32)
        mask = inside[:, None] & (column <= tl.minimum(last, LOG_C))
        tl.store(to[:, None] + column, sums_JL.to(to_dscales.dtype.element_ty), mask=mask)

    # dS, the flow through its decays, and what dq takes of it
    inverse_own = load_tile(inverse, own, own, C, J)
    dscores_own = tl.dot(deffective_own, tl.trans(inverse_own), input_precision=PRECISION)
    if EARLIER:
        inverse_across = load_tile(inverse, own, 0, C, J)
        dscores_own = tl.dot(deffective_first, tl.trans(inverse_across), dscores_own, input_precision=PRECISION)
    store_block(dscores, own, own, dscores_own, C, C, J, J)
    dscores_own *= decay(G_own, G_own, i, J) * scale
    flow_JJ = dscores_own * multiply_rows(q_rows, own_rows, q_t, k_t, n, n, K, J, TK, DOT, PRECISION)
    dscores_own = dscores_own.to(DOT)
    tl.store(shares + own + i, tl.sum(flow_JJ, 0))
    flows = tl.sum(flow_JJ, 1)
    if EARLIER:
        inverse_first = load_tile(inverse, 0, 0, C, J)
        dscores_first = tl.dot(deffective_first, tl.trans(inverse_first), input_precision=PRECISION)
        store_block(dscores, own, 0, dscores_first, C, C, J, J)
        dscores_first *= tl.exp2(G_own[:, None] - G_first[None, :]) * scale
        flow_JJ = dscores_first * multiply_rows(q_rows, k_rows, q_t, k_t, n, n_first, K, J, TK, DOT, PRECISION)
        dscores_first = dscores_first.to(DOT)
        tl.store(shares + i, tl.sum(flow_JJ, 0))
        flows += tl.sum(flow_JJ, 1)
    for t in range(0, K, TK):
        dq_JT = load_rows(dseen_rows, K, n, t, J, K, TK).to(tl.float32) * (tl.exp2(G_own) * scale)[:, None]
        flows += tl.sum(dq_JT * load_rows(q_rows, q_t, n, t, J, K, TK).to(tl.float32), 1)
        k_JT = load_rows(own_rows, k_t, n, t, J, K, TK).to(DOT)
        dq_JT = tl.dot(dscores_own, k_JT, dq_JT, input_precision=PRECISION)
        if EARLIER:
            k_JT = load_rows(k_rows, k_t, n_first, t, J, K, TK).to(DOT)
            dq_JT = tl.dot(dscores_first, k_JT, dq_JT, input_precision=PRECISION)
        store_rows(dq_rows, dq_t, n, t, dq_JT, J, K, TK)
    tl.store(flow + own + i, flows)


@triton.jit(do_not_specialize=SIZES)
def scores_backward_kernel(
    q, k, v, beta, level_scales, inverse, cumulative, effective, dseen, do,
    dq, dscores, weights, flow, shares, dlevel_scales, table,
    T, N, H, R, L, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, l_b, l_t, l_h, o_b, o_t, o_h, dq_t, dl_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, PARTS: tl.constexpr,
    TK: tl.constexpr, BV: tl.constexpr,
    LINEAR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """C / PARTS rows of one chunk, one head: dq [B, T, H, K]; dS and T * LAM [chunk, H, C, C]; the columns of
    dlevel_scales up to LOG_C, adding to the last one where the walk shares it. Of the decays' gradient the rows' share,
    flow [chunk, H, C], and the columns', shares [chunk, H, part, C]: of those that the part reads."""
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    J: tl.constexpr = C // PARTS
    h, c, b, first, z, z0, sequence, n_keys, own, n = part_program(table, T, N, H, C, PARTS, PACKED)
    if n_keys <= 0:
        return
    row, token = c * H + h, b * T + first + own
    k_rows, v_rows = k + b * k_b + first * k_t + (h // R) * k_h, v + b * v_b + first * v_t + h * v_h
    q_rows = q + b * q_b + (first + own) * q_t + (h // R) * q_h
    do_rows = do + b * o_b + (first + own) * o_t + h * o_h
    beta += b * beta_b + first * beta_t + h * beta_h
    scales = level_scales + b * l_b + (first + own) * l_t + h * l_h
    dq_rows, to_dscales = dq + token * dq_t + h * K, dlevel_scales + token * dl_t + h * L
    inverse, effective = inverse + row * (C * C), effective + row * (C * C)
    weights, dscores, dseen_rows = weights + row * (C * C), dscores + row * (C * C), dseen + (row * C + own) * K
    G, flow, shares = cumulative + row * C, flow + row * C, shares + (row * PARTS + own // J) * C
    arguments = (
        q_rows, q_t, k_rows, k_t, v_rows, v_t, do_rows, o_t, dseen_rows, n, n_keys, beta, beta_t, scales, l_t, L, G,
        inverse, effective, weights, dscores, dq_rows, dq_t, flow, shares, to_dscales, dl_t, scale,
    )  # fmt: skip
    if own == 0:
        scores_part(arguments, K, V, C, J, LOG_C, TK, BV, False, LINEAR, DTYPE, DOT, PRECISION)
    elif PARTS > 1:
        scores_part(arguments, K, V, C, J, LOG_C, TK, BV, True, LINEAR, DTYPE, DOT, PRECISION)


@triton.jit
def write_tile(
    inverse, m_rows, m_t, n, n_first, weight, column,
    WIDTH: tl.constexpr, C: tl.constexpr, J: tl.constexpr, BV: tl.constexpr,
    EARLIER: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U = A R, R = diag(weight) m, of a part's own rows and a tile of columns; then the earlier part's, or nothing."""
    own: tl.constexpr = J if EARLIER else 0
    r_JV = load_rows(m_rows + own * m_t, m_t, n, column, J, WIDTH, BV).to(tl.float32) * weight[0][:, None]
    write_JV = tl.dot(load_tile(inverse, own, own, C, J), r_JV.to(DOT), input_precision=PRECISION)
    if EARLIER:
        r_JV = load_rows(m_rows, m_t, n_first, column, J, WIDTH, BV).to(tl.float32) * weight[1][:, None]
        r_JV = r_JV.to(DOT)
        write_JV = tl.dot(load_tile(inverse, own, 0, C, J), r_JV, write_JV, input_precision=PRECISION)
        return write_JV, tl.dot(load_tile(inverse, 0, 0, C, J), r_JV, input_precision=PRECISION).to(DOT)
    else:
        return write_JV, write_JV


@triton.jit
def dwrite_tile(
    k_rows, k_t, n, to_end, dstate, column,
    K: tl.constexpr, WIDTH: tl.constexpr, J: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dU = Kd dstate, of J rows and a tile of columns."""
    dwrite_JV = tl.zeros([J, BV], tl.float32)
    for t in range(0, K, TK):
        k_JT = load_rows(k_rows, k_t, n, t, J, K, TK).to(DOT)
        dstate_TV = load_block(dstate, t, column, K, WIDTH, TK, BV)
        dwrite_JV = tl.dot(k_JT, dstate_TV, dwrite_JV, input_precision=PRECISION)
    return dwrite_JV * to_end[:, None]


@triton.jit
def writes_backward(
    dlower, dacross, kept, k_rows, k_t, to_end, n, n_first, n_keys, inverse,
    m_rows, m_t, weight, dstate, weights, g_rows, g_t, out, out_t,
    WIDTH: tl.constexpr, K: tl.constexpr, C: tl.constexpr, J: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    EARLIER: tl.constexpr, LATER: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One kind of columns, m = V or K: stores diag(weight) dR in `out`, adds dY U^T to the parts of dlower and dacross,
    rowsum(U * dU) to kept, and returns them with rowsum(dR * m). g: dO or dX, what `weights` are multiplied with."""
    own: tl.constexpr = J if EARLIER else 0
    met = tl.zeros([J], tl.float32)
    for column in range(0, WIDTH, BV):
        if LATER:
            later_rows = k_rows + J * k_t
            dlater_JV = dwrite_tile(
                later_rows, k_t, n_keys - J, to_end[1], dstate, column, K, WIDTH, J, TK, BV, DOT, PRECISION
            ).to(DOT)
            dy_JV = tl.dot(tl.trans(load_tile(inverse, J, J, C, J)), dlater_JV, input_precision=PRECISION).to(DOT)
        write_JV, first_JV = write_tile(
            inverse, m_rows, m_t, n, n_first, weight, column, WIDTH, C, J, BV, EARLIER, DOT, PRECISION
        )
        dwrite_JV = dwrite_tile(
            k_rows + own * k_t, k_t, n, to_end[0], dstate, column, K, WIDTH, J, TK, BV, DOT, PRECISION
        )
        kept += tl.sum(write_JV * dwrite_JV, 1)
        write_JV = write_JV.to(DOT)
        if LATER:
            dacross = tl.dot(dy_JV, tl.trans(write_JV), dacross, input_precision=PRECISION)
        inverse_own = tl.trans(load_tile(inverse, own, own, C, J))
        dr_JV = tl.dot(inverse_own, dwrite_JV.to(DOT), input_precision=PRECISION)
        if LATER:
            dr_JV = tl.dot(tl.trans(load_tile(inverse, J, 0, C, J)), dlater_JV, dr_JV, input_precision=PRECISION)
        dy_JV = dr_JV.to(DOT)
        dlower = tl.dot(dy_JV, tl.trans(write_JV), dlower, input_precision=PRECISION)
        if EARLIER:
            dacross = tl.dot(dy_JV, tl.trans(first_JV), dacross, input_precision=PRECISION)
        weights_own = tl.trans(load_tile(weights, own, own, C, J))
        g_JV = load_rows(g_rows + own * g_t, g_t, n, column, J, WIDTH, BV).to(DOT)
        dr_JV = tl.dot(weights_own, g_JV, dr_JV, input_precision=PRECISION)
        if LATER:
            g_JV = load_rows(g_rows + J * g_t, g_t, n_keys - J, column, J, WIDTH, BV).to(DOT)
            dr_JV = tl.dot(tl.trans(load_tile(weights, J, 0, C, J)), g_JV, dr_JV, input_precision=PRECISION)
        m_JV = load_rows(m_rows + own * m_t, m_t, n, column, J, WIDTH, BV).to(tl.float32)
        met += tl.sum(dr_JV * m_JV, 1)
        store_rows(out, out_t, n, column, dr_JV * weight[0][:, None], J, WIDTH, BV)
    return dlower, dacross, kept, met


@triton.jit
def through_writes(
    dk, inverse, m_rows, m_t, n, n_first, weight, to_end, dstate,
    WIDTH: tl.constexpr, K: tl.constexpr, C: tl.constexpr, J: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    EARLIER: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk + diag(to_end) U dstate^T, in tiles of TK columns."""
    for column in range(0, WIDTH, BV):
        write_JV, _ = write_tile(
            inverse, m_rows, m_t, n, n_first, weight, column, WIDTH, C, J, BV, EARLIER, DOT, PRECISION
        )
        write_JV = (write_JV * to_end[:, None]).to(DOT)
        new = ()
        for t in tl.static_range((K + TK - 1) // TK):
            dstate_TV = load_block(dstate, t * TK, column, K, WIDTH, TK, BV)
            new = new + (tl.dot(write_JV, tl.trans(dstate_TV), dk[t], input_precision=PRECISION),)
        dk = new
    return dk


@triton.jit
def keys_part(
    arguments, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, J: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    EARLIER: tl.constexpr, LATER: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of n tokens, in a chunk of n_keys. EARLIER, LATER: there is one before it, behind it."""
    (
        q_rows, q_t, k_rows, k_t, v_rows, v_t, do_rows, o_t, dseen_rows, n, n_keys, beta, beta_t, cumulative,
        inverse, effective, weights, dscores, dslots, dtransitions, flow, kept, shares, dk_rows, dk_t, dv_rows, dv_t,
        dbeta_rows, db_t, scale,
    ) = arguments  # fmt: skip
    own: tl.constexpr = J if EARLIER else 0
    i, own_rows, n_first, n_later = tl.arange(0, J), k_rows + own * k_t, tl.minimum(n_keys, J), n_keys - J
    later_rows = k_rows + J * k_t
    G, total = load_part(cumulative, own, J), tl.load(cumulative + (C - 1))
    strength, to_end = load_strength(beta + own * beta_t, beta_t, n, J), (tl.exp2(total - G),)
    values, keys = (strength,), (-strength * tl.exp2(G),)  # R = diag(values) V and diag(keys) K
    if EARLIER:
        G_first, strength_first = load_part(cumulative, 0, J), load_strength(beta, beta_t, n_first, J)
        values, keys = values + (strength_first,), keys + (-strength_first * tl.exp2(G_first),)
    if LATER:
        G_later = load_part(cumulative, J, J)
        to_end = to_end + (tl.exp2(total - G_later),)

    # Of dN the own part's tile, and the one that its tokens share with the other part's.
    dscores_own, effective_own = load_tile(dscores, own, own, C, J), load_tile(effective, own, own, C, J)
    dlower_JJ = tl.dot(tl.trans(effective_own), dscores_own, input_precision=PRECISION)
    dacross_JJ = tl.zeros([J, J], tl.float32)
    if LATER:
        dscores_later, effective_across = load_tile(dscores, J, 0, C, J), load_tile(effective, J, 0, C, J)
        dlower_JJ = tl.dot(tl.trans(effective_across), dscores_later, dlower_JJ, input_precision=PRECISION)
        effective_later = load_tile(effective, J, J, C, J)
        dacross_JJ = tl.dot(tl.trans(effective_later), dscores_later, dacross_JJ, input_precision=PRECISION)
    if EARLIER:
        dscores_across = load_tile(dscores, own, 0, C, J)
        dacross_JJ = tl.dot(tl.trans(effective_own), dscores_across, dacross_JJ, input_precision=PRECISION)
    dlower_JJ, dacross_JJ, held, met = writes_backward(
        dlower_JJ, dacross_JJ, tl.zeros([J], tl.float32), k_rows, k_t, to_end, n, n_first, n_keys, inverse,
        v_rows, v_t, values, dslots, weights, do_rows, o_t, dv_rows, dv_t,
        V, K, C, J, TK, BV, EARLIER, LATER, DOT, PRECISION,
    )  # fmt: skip
    dlower_JJ, dacross_JJ, held, read = writes_backward(
        dlower_JJ, dacross_JJ, held, k_rows, k_t, to_end, n, n_first, n_keys, inverse,
        k_rows, k_t, keys, dtransitions, effective, dseen_rows, K, dk_rows, dk_t,
        K, K, C, J, TK, BV, EARLIER, LATER, DOT, PRECISION,
    )  # fmt: skip
    tl.store(kept + own + i, held)
    dstrength = met - tl.exp2(G) * read
    flows = tl.load(flow + own + i) + keys[0] * read - tl.load(shares + own // J * C + own + i)

    # dN, and the flow through its decays
    dlower_JJ *= -tl.where(i[:, None] > i[None, :], decay(G, G, i, J), 0.0)
    products_JJ = dlower_JJ * multiply_rows(own_rows, own_rows, k_t, k_t, n, n, K, J, TK, DOT, PRECISION)
    dstrength += tl.sum(products_JJ, 1)
    products_JJ *= strength[:, None]
    flows += tl.sum(products_JJ, 1) - tl.sum(products_JJ, 0)
    dlower_JJ *= strength[:, None]
    dkeys_own = (dlower_JJ + tl.trans(dlower_JJ)).to(DOT)
    if LATER:
        flows -= tl.load(shares + C + i)
        strength_later = load_strength(beta + J * beta_t, beta_t, n_later, J)
        dacross_JJ *= -tl.exp2(G_later[:, None] - G[None, :]) * strength_later[:, None]
        products_JJ = multiply_rows(later_rows, own_rows, k_t, k_t, n_later, n, K, J, TK, DOT, PRECISION)
        flows -= tl.sum(dacross_JJ * products_JJ, 0)
        dkeys_across = tl.trans(dacross_JJ.to(DOT))
    if EARLIER:
        dacross_JJ *= -tl.exp2(G[:, None] - G_first[None, :])
        products_JJ = multiply_rows(own_rows, k_rows, k_t, k_t, n, n_first, K, J, TK, DOT, PRECISION)
        products = tl.sum(dacross_JJ * products_JJ, 1)
        dstrength += products
        flows += products * strength
        dkeys_across = (dacross_JJ * strength[:, None]).to(DOT)
    tl.store(flow + own + i, flows)
    tl.store(dbeta_rows + i * db_t, dstrength.to(dbeta_rows.dtype.element_ty), mask=i < n)
    tl.debug_barrier()  # what this program stored in dk is seen; and what was loaded is not kept until here

    dscores_own = load_tile(dscores, own, own, C, J).to(tl.float32) * (decay(G, G, i, J) * scale)
    dscores_own = tl.trans(dscores_own.to(DOT))
    if LATER:
        dscores_later = load_tile(dscores, J, 0, C, J).to(tl.float32)
        dscores_later = tl.trans((dscores_later * (tl.exp2(G_later[:, None] - G[None, :]) * scale)).to(DOT))
    dk = ()
    for t in tl.static_range(0, K, TK):
        dk_JT = load_rows(dk_rows, dk_t, n, t, J, K, TK).to(tl.float32)
        k_JT = load_rows(own_rows, k_t, n, t, J, K, TK).to(DOT)
        dk_JT = tl.dot(dkeys_own, k_JT, dk_JT, input_precision=PRECISION)
        q_JT = load_rows(q_rows + own * q_t, q_t, n, t, J, K, TK).to(DOT)
        dk_JT = tl.dot(dscores_own, q_JT, dk_JT, input_precision=PRECISION)
        if LATER:
            k_JT = load_rows(later_rows, k_t, n_later, t, J, K, TK).to(DOT)
            dk_JT = tl.dot(dkeys_across, k_JT, dk_JT, input_precision=PRECISION)
            q_JT = load_rows(q_rows + J * q_t, q_t, n_later, t, J, K, TK).to(DOT)
            dk_JT = tl.dot(dscores_later, q_JT, dk_JT, input_precision=PRECISION)
        if EARLIER:
            k_JT = load_rows(k_rows, k_t, n_first, t, J, K, TK).to(DOT)
            dk_JT = tl.dot(dkeys_across, k_JT, dk_JT, input_precision=PRECISION)
        dk = dk + (dk_JT,)
    dk = through_writes(
        dk, inverse, v_rows, v_t, n, n_first, values, to_end[0], dslots,
        V, K, C, J, TK, BV, EARLIER, DOT, PRECISION,
    )  # fmt: skip
    dk = through_writes(
        dk, inverse, k_rows, k_t, n, n_first, keys, to_end[0], dtransitions,
        K, K, C, J, TK, BV, EARLIER, DOT, PRECISION,
    )  # fmt: skip
    for t in tl.static_range((K + TK - 1) // TK):
        store_rows(dk_rows, dk_t, n, t * TK, dk[t], J, K, TK)


@triton.jit(do_not_specialize=SIZES)
def keys_backward_kernel(
    q, k, v, beta, cumulative, inverse, effective, weights, dscores, dslots, dtransitions, dseen, do,
    flow, kept, shares, dk, dv, dbeta, table,
    T, N, H, R, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, o_b, o_t, o_h, dk_t, dv_t, db_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """C / PARTS tokens of one chunk, one head: dk [B, T, H, K], dv, dbeta; adds to the decays' flow [chunk, H, C], and
    kept [chunk, H, C] is what flows from each token's write to the chunk's end."""
    J: tl.constexpr = C // PARTS
    h, c, b, first, z, z0, sequence, n_keys, own, n = part_program(table, T, N, H, C, PARTS, PACKED)
    if n <= 0:
        return
    row, token = c * H + h, b * T + first + own
    k_rows, q_rows = k + b * k_b + first * k_t + (h // R) * k_h, q + b * q_b + first * q_t + (h // R) * q_h
    v_rows, do_rows = v + b * v_b + first * v_t + h * v_h, do + b * o_b + first * o_t + h * o_h
    beta += b * beta_b + first * beta_t + h * beta_h
    dk_rows, dv_rows, dbeta_rows = dk + token * dk_t + h * K, dv + token * dv_t + h * V, dbeta + token * db_t + h
    inverse, effective = inverse + row * (C * C), effective + row * (C * C)
    weights, dscores, dseen_rows = weights + row * (C * C), dscores + row * (C * C), dseen + row * (C * K)
    dslots, dtransitions = dslots + row * (K * V), dtransitions + row * (K * K)
    cumulative, flow, kept, shares = cumulative + row * C, flow + row * C, kept + row * C, shares + row * (PARTS * C)
    arguments = (
        q_rows, q_t, k_rows, k_t, v_rows, v_t, do_rows, o_t, dseen_rows, n, n_keys, beta, beta_t, cumulative,
        inverse, effective, weights, dscores, dslots, dtransitions, flow, kept, shares, dk_rows, dk_t, dv_rows, dv_t,
        dbeta_rows, db_t, scale,
    )  # fmt: skip
    if own == 0:
        keys_part(arguments, K, V, C, J, TK, BV, False, PARTS > 1, DOT, PRECISION)
    elif PARTS > 1:
        keys_part(arguments, K, V, C, J, TK, BV, True, False, DOT, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def decay_backward_kernel(
    log_decay, cumulative, dtransitions, flow, kept, dlog_decay, table,
    T, N, H,
    g_b, g_t, g_h, dg_t,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, PACKED: tl.constexpr,
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
    held = tl.load(kept + row * C + i, mask=inside, other=0.0)
    dg = tl.cumsum(flows, 0, reverse=True) + (tl.cumsum(held, 0) - held) + crossing * tl.exp2(total)
    g = tl.load(log_decay + b * g_b + first * g_t + h * g_h + i * g_t, mask=inside, other=0.0).to(tl.float32)
    dg = tl.where(g < MIN_LOG_DECAY, 0.0, dg)
    tl.store(dlog_decay + (b * T + first) * dg_t + h + i * dg_t, dg.to(dlog_decay.dtype.element_ty), mask=inside)
