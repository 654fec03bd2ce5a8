"""Everything that stays inside a chunk, differentiated.

    S = Q K^T * dec,   T = S A,   A = (I + N)^-1,   N = tril(diag(b) K K^T * dec, -1),   Kd = diag(exp(Gam - G)) K
    M = [V | -diag(exp(G)) K],   R = diag(b) M,   U = A R
    O = (T * LAM) R_V,   X = diag(exp(G)) Q + T R_K,   [S_z | P_z] = Kd^T U + [0 | exp(Gam) I]

The queries' side, in rows of the chunk,

    dT = (dO V^T * LAM - dX K^T diag(exp(G))) diag(b),   dS = dT A^T,   dQ = (dS * dec) K + diag(exp(G)) dX

and the writes', in tiles of columns of [V | K], which are all treated alike,

    dU = Kd [dS_z | dP_z],   dY = A^T dU,   dR = dY + [(T * LAM)^T dO | T^T dX],   dM = diag(b) dR
    db = rowsum(dR * M)

What A is multiplied with gives dN = -A^T dA A^T, and the keys get

    dN = -tril(T^T dS + dY U^T, -1),   dKd = U [dS_z | dP_z]^T,   rowsum(dKd * Kd) = rowsum(U * dU)

A chunk of 128 is two parts of 64 tokens; tiles above the diagonal are neither computed nor read.
"""

# C chunk, J tokens of a part, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.in_chunk import is_level, load_part, load_tile, multiply_rows, own_scales
from loglinear.kernels.triton.delta_rule.tiles import (
    decay,
    load_decays,
    load_strength,
    part_program,
)
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import (
    MIN_LOG_DECAY,
    SIZES,
    arrived,
    head_program,
    load_block,
    load_rows,
    locate,
    store_block,
    store_rows,
)


@triton.jit
def sums_by_level(x_JJ, last, J: tl.constexpr, LOG_J: tl.constexpr):
    """Sums of x over the columns of each level [J, level], those from the last on in its column. (A choice for each
    level and place: triton 3.6 makes wrong code of products with indicators of the levels where registers are few.)"""
    column, sums_JL = tl.arange(0, 16)[None, :], tl.zeros([J, 16], tl.float32)
    for level in tl.static_range(LOG_J + 1):
        total = tl.sum(tl.where(is_level(tl.arange(0, J), level, J), x_JJ, 0.0), 1)
        sums_JL += tl.where(column == tl.minimum(level, last), total[:, None], 0.0)
    return sums_JL


@triton.jit
def scores_part(
    arguments, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, J: tl.constexpr, LOG_C: tl.constexpr,
    TK: tl.constexpr, BV: tl.constexpr, EARLIER: tl.constexpr,
    LINEAR: tl.constexpr, DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of n tokens, in a chunk of n_keys. EARLIER: there is one before it."""
    (
        q_rows, q_t, k_rows, k_t, v_rows, v_t, do_rows, o_t, dseen_rows, n, n_keys, beta, beta_t, scales, l_t, L, G,
        inverse, effective, dscores, dq_rows, dq_t, flow, shares, to_dscales, dl_t, scale,
    ) = arguments  # fmt: skip
    own: tl.constexpr = J if EARLIER else 0
    i, last = tl.arange(0, J), L - 1
    own_rows, own_values = k_rows + own * k_t, v_rows + own * v_t
    G_own, n_first = load_part(G, own, J), tl.minimum(n_keys, J)
    across, flows = tl.zeros([J], tl.float32), tl.zeros([J], tl.float32)
    dscores_own = tl.zeros([J, J], tl.float32)
    if EARLIER:  # all of the earlier part is read at one level
        G_first, strength = load_part(G, 0, J), load_strength(beta, beta_t, n_first, J)
        pulled_JJ = multiply_rows(do_rows, v_rows, o_t, v_t, n, n_first, V, J, BV, DOT, PRECISION)
        pulled_JJ *= strength[None, :]
        across = tl.sum(pulled_JJ * load_tile(effective, own, 0, C, J).to(tl.float32), 1)
        pulled_JJ *= arrived(load_scale(scales, l_t, n, LOG_C, L, i), DTYPE)[:, None]
        read_JJ = multiply_rows(dseen_rows, k_rows, K, k_t, n, n_first, K, J, TK, DOT, PRECISION)
        deffective_JJ = (pulled_JJ - read_JJ * (strength * tl.exp2(G_first))[None, :]).to(DOT)
        inverse_JJ = tl.trans(load_tile(inverse, own, 0, C, J))
        dscores_own = tl.dot(deffective_JJ, inverse_JJ, dscores_own, input_precision=PRECISION)
        inverse_JJ = tl.trans(load_tile(inverse, 0, 0, C, J))
        dscores_JJ = tl.dot(deffective_JJ, inverse_JJ, input_precision=PRECISION)
        store_block(dscores, own, 0, dscores_JJ, C, C, J, J)
        flow_JJ = dscores_JJ * (tl.exp2(G_own[:, None] - G_first[None, :]) * scale)
        flow_JJ *= multiply_rows(q_rows, k_rows, q_t, k_t, n, n_first, K, J, TK, DOT, PRECISION)
        tl.store(shares + i, tl.sum(flow_JJ, 0))
        flows += tl.sum(flow_JJ, 1)

    strength = load_strength(beta + own * beta_t, beta_t, n, J)
    pulled_JJ = multiply_rows(do_rows, own_values, o_t, v_t, n, n, V, J, BV, DOT, PRECISION) * strength[None, :]
    given_JJ = pulled_JJ * load_tile(effective, own, own, C, J).to(tl.float32)
    # The walk has stored what it gives to a last column that the chunk shares.
    column, inside = tl.arange(0, 1 if LINEAR else 16)[None, :], (i < n)[:, None]
    to = to_dscales + (i * dl_t)[:, None] + column
    sums_JL = tl.sum(given_JJ, 1)[:, None] if LINEAR else sums_by_level(given_JJ, last, J, LOG_C - EARLIER)
    sums_JL += tl.where(column == tl.minimum(last, LOG_C), across[:, None], 0.0)
    sums_JL += tl.load(to, mask=inside & (column == last) & (last <= LOG_C), other=0.0).to(tl.float32)
    tl.store(to, sums_JL.to(to_dscales.dtype.element_ty), mask=inside & (column <= tl.minimum(last, LOG_C)))
    # Columns j > i of dT are not 0 here; dS takes no part of them to j <= i.
    pulled_JJ *= own_scales(scales, l_t, n, L, J, LOG_C - EARLIER, LINEAR, DTYPE)
    pulled_JJ = tl.where(i[:, None] >= i[None, :], pulled_JJ, 0.0)
    read_JJ = multiply_rows(dseen_rows, own_rows, K, k_t, n, n, K, J, TK, DOT, PRECISION)
    deffective_JJ = (pulled_JJ - read_JJ * (strength * tl.exp2(G_own))[None, :]).to(DOT)
    inverse_JJ = tl.trans(load_tile(inverse, own, own, C, J))
    dscores_own = tl.dot(deffective_JJ, inverse_JJ, dscores_own, input_precision=PRECISION)
    store_block(dscores, own, own, dscores_own, C, C, J, J)
    flow_JJ = dscores_own * (decay(G_own, G_own, i, J) * scale)
    flow_JJ *= multiply_rows(q_rows, own_rows, q_t, k_t, n, n, K, J, TK, DOT, PRECISION)
    tl.store(shares + own + i, tl.sum(flow_JJ, 0))
    flows += tl.sum(flow_JJ, 1)

    tl.debug_barrier()  # dS as it was stored
    dscores_own = load_tile(dscores, own, own, C, J).to(tl.float32) * (decay(G_own, G_own, i, J) * scale)
    dscores_own = dscores_own.to(DOT)
    if EARLIER:
        dscores_first = load_tile(dscores, own, 0, C, J).to(tl.float32)
        dscores_first = (dscores_first * (tl.exp2(G_own[:, None] - G_first[None, :]) * scale)).to(DOT)
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
    dq, dscores, flow, shares, dlevel_scales, table,
    T, N, H, R, L, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, l_b, l_t, l_h, o_b, o_t, o_h, dq_t, dl_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, PARTS: tl.constexpr,
    TK: tl.constexpr, BV: tl.constexpr,
    LINEAR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """C / PARTS rows of one chunk, one head: dq [B, T, H, K]; dS [chunk, H, C, C]; the columns of dlevel_scales
    up to LOG_C, adding to the last one where the walk shares it. Of the decays' gradient the rows' share,
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
    dscores, dseen_rows = dscores + row * (C * C), dseen + (row * C + own) * K
    G, flow, shares = cumulative + row * C, flow + row * C, shares + (row * PARTS + own // J) * C
    arguments = (
        q_rows, q_t, k_rows, k_t, v_rows, v_t, do_rows, o_t, dseen_rows, n, n_keys, beta, beta_t, scales, l_t, L, G,
        inverse, effective, dscores, dq_rows, dq_t, flow, shares, to_dscales, dl_t, scale,
    )  # fmt: skip
    if own == 0:
        scores_part(arguments, K, V, C, J, LOG_C, TK, BV, False, LINEAR, DTYPE, DOT, PRECISION)
    elif PARTS > 1:
        scores_part(arguments, K, V, C, J, LOG_C, TK, BV, True, LINEAR, DTYPE, DOT, PRECISION)


@triton.jit
def write_tile(
    inverse, m_rows, m_t, n, n_first, weight, column, turn,
    WIDTH: tl.constexpr, C: tl.constexpr, J: tl.constexpr, BV: tl.constexpr,
    EARLIER: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U = A R, R = diag(weight) m, of a part's own rows and a tile of columns; then the earlier part's, or nothing."""
    own: tl.constexpr = J if EARLIER else 0
    r_JV = load_rows(m_rows + own * m_t, m_t, n, column, J, WIDTH, BV, turn).to(tl.float32) * weight[0][:, None]
    write_JV = tl.dot(load_tile(inverse, own, own, C, J, turn), r_JV.to(DOT), input_precision=PRECISION)
    if EARLIER:
        r_JV = load_rows(m_rows, m_t, n_first, column, J, WIDTH, BV, turn).to(tl.float32) * weight[1][:, None]
        r_JV = r_JV.to(DOT)
        write_JV = tl.dot(load_tile(inverse, own, 0, C, J, turn), r_JV, write_JV, input_precision=PRECISION)
        return write_JV, tl.dot(load_tile(inverse, 0, 0, C, J, turn), r_JV, input_precision=PRECISION).to(DOT)
    else:
        return write_JV, write_JV


@triton.jit
def dwrite_tile(
    k_rows, k_t, n, to_end, dstate, column, turn,
    K: tl.constexpr, WIDTH: tl.constexpr, J: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dU = Kd dstate, of J rows and a tile of columns."""
    dwrite_JV = tl.zeros([J, BV], tl.float32)
    for t in range(0, K, TK):
        k_JT = load_rows(k_rows, k_t, n, t, J, K, TK, turn).to(DOT)
        dstate_TV = load_block(dstate, t, column, K, WIDTH, TK, BV, turn)
        dwrite_JV = tl.dot(k_JT, dstate_TV, dwrite_JV, input_precision=PRECISION)
    return dwrite_JV * to_end[:, None]


@triton.jit
def writes_backward(
    dlower, dacross, kept, k_rows, k_t, to_end, n, n_first, n_keys, inverse,
    m_rows, m_t, weight, dstate, weights, g_rows, g_t, out, out_t, H,
    WIDTH: tl.constexpr, K: tl.constexpr, C: tl.constexpr, J: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    EARLIER: tl.constexpr, LATER: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One kind of columns, m = V or K: stores diag(weight) dR in `out`, adds dY U^T to the parts of dlower and dacross,
    rowsum(U * dU) to kept, and returns them with rowsum(dR * m). g: dO or dX, what `weights` are multiplied with."""
    own: tl.constexpr = J if EARLIER else 0
    met = tl.zeros([J], tl.float32)
    for column in range(0, WIDTH, BV):
        turn = column + H  # of which the compiler knows nothing: see `rows_again`
        if LATER:
            later_rows = k_rows + J * k_t
            dlater_JV = dwrite_tile(
                later_rows, k_t, n_keys - J, to_end[1], dstate, column, turn, K, WIDTH, J, TK, BV, DOT, PRECISION
            ).to(DOT)
            dy_JV = tl.dot(tl.trans(load_tile(inverse, J, J, C, J, turn)), dlater_JV, input_precision=PRECISION).to(DOT)
        write_JV, first_JV = write_tile(
            inverse, m_rows, m_t, n, n_first, weight, column, turn, WIDTH, C, J, BV, EARLIER, DOT, PRECISION
        )
        dwrite_JV = dwrite_tile(
            k_rows + own * k_t, k_t, n, to_end[0], dstate, column, turn, K, WIDTH, J, TK, BV, DOT, PRECISION
        )
        kept += tl.sum(write_JV * dwrite_JV, 1)
        write_JV = write_JV.to(DOT)
        if LATER:
            dacross = tl.dot(dy_JV, tl.trans(write_JV), dacross, input_precision=PRECISION)
        inverse_own = tl.trans(load_tile(inverse, own, own, C, J, turn))
        dr_JV = tl.dot(inverse_own, dwrite_JV.to(DOT), input_precision=PRECISION)
        if LATER:
            dr_JV = tl.dot(tl.trans(load_tile(inverse, J, 0, C, J, turn)), dlater_JV, dr_JV, input_precision=PRECISION)
        dy_JV = dr_JV.to(DOT)
        dlower = tl.dot(dy_JV, tl.trans(write_JV), dlower, input_precision=PRECISION)
        if EARLIER:
            dacross = tl.dot(dy_JV, tl.trans(first_JV), dacross, input_precision=PRECISION)
        weights_own = tl.trans(load_tile(weights, own, own, C, J, turn))
        g_JV = load_rows(g_rows + own * g_t, g_t, n, column, J, WIDTH, BV, turn).to(DOT)
        dr_JV = tl.dot(weights_own, g_JV, dr_JV, input_precision=PRECISION)
        if LATER:
            g_JV = load_rows(g_rows + J * g_t, g_t, n_keys - J, column, J, WIDTH, BV, turn).to(DOT)
            dr_JV = tl.dot(tl.trans(load_tile(weights, J, 0, C, J, turn)), g_JV, dr_JV, input_precision=PRECISION)
        tl.debug_barrier()  # nothing to wait for, but m is loaded behind it and not kept from the product above
        m_JV = load_rows(m_rows + own * m_t, m_t, n, column, J, WIDTH, BV, turn).to(tl.float32)
        met += tl.sum(dr_JV * m_JV, 1)
        store_rows(out, out_t, n, column, dr_JV * weight[0][:, None], J, WIDTH, BV, turn)
    return dlower, dacross, kept, met


@triton.jit
def add_products(
    dk, x_JJ, rows, stride, n,
    K: tl.constexpr, J: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk + x rows, in tiles of TK columns."""
    new = ()
    for t in tl.static_range((K + TK - 1) // TK):
        y_JT = load_rows(rows, stride, n, t * TK, J, K, TK).to(DOT)
        new = new + (tl.dot(x_JJ, y_JT, dk[t], input_precision=PRECISION),)
    return new


@triton.jit
def through_writes(
    dk, inverse, m_rows, m_t, n, n_first, weight, to_end, dstate, H,
    WIDTH: tl.constexpr, K: tl.constexpr, C: tl.constexpr, J: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    EARLIER: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk + diag(to_end) U dstate^T, in tiles of TK columns."""
    for column in range(0, WIDTH, BV):
        turn = column + H
        write_JV, _ = write_tile(
            inverse, m_rows, m_t, n, n_first, weight, column, turn, WIDTH, C, J, BV, EARLIER, DOT, PRECISION
        )
        write_JV = (write_JV * to_end[:, None]).to(DOT)
        new = ()
        for t in tl.static_range((K + TK - 1) // TK):
            dstate_TV = load_block(dstate, t * TK, column, K, WIDTH, TK, BV, turn)
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
        dbeta_rows, db_t, H, scale,
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
        v_rows, v_t, values, dslots, weights, do_rows, o_t, dv_rows, dv_t, H,
        V, K, C, J, TK, BV, EARLIER, LATER, DOT, PRECISION,
    )  # fmt: skip
    dlower_JJ, dacross_JJ, held, read = writes_backward(
        dlower_JJ, dacross_JJ, held, k_rows, k_t, to_end, n, n_first, n_keys, inverse,
        k_rows, k_t, keys, dtransitions, effective, dseen_rows, K, dk_rows, dk_t, H,
        K, K, C, J, TK, BV, EARLIER, LATER, DOT, PRECISION,
    )  # fmt: skip
    tl.store(kept + own + i, held)
    dstrength = met - tl.exp2(G) * read
    flows = tl.load(flow + own + i) + keys[0] * read - tl.load(shares + own // J * C + own + i)

    tl.debug_barrier()  # what this program stored in dk is seen
    dk = ()
    for t in tl.static_range(0, K, TK):
        dk = dk + (load_rows(dk_rows, dk_t, n, t, J, K, TK).to(tl.float32),)

    # dN, and the flow through its decays; then dS, tile by tile
    if LATER:
        flows -= tl.load(shares + C + i)
        strength_later = load_strength(beta + J * beta_t, beta_t, n_later, J)
        dacross_JJ *= -tl.exp2(G_later[:, None] - G[None, :]) * strength_later[:, None]
        dk = add_products(dk, tl.trans(dacross_JJ.to(DOT)), later_rows, k_t, n_later, K, J, TK, DOT, PRECISION)
        products_JJ = multiply_rows(later_rows, own_rows, k_t, k_t, n_later, n, K, J, TK, DOT, PRECISION)
        flows -= tl.sum(dacross_JJ * products_JJ, 0)
    if EARLIER:
        dacross_JJ *= -tl.exp2(G[:, None] - G_first[None, :])
        dk = add_products(dk, (dacross_JJ * strength[:, None]).to(DOT), k_rows, k_t, n_first, K, J, TK, DOT, PRECISION)
        products_JJ = multiply_rows(own_rows, k_rows, k_t, k_t, n, n_first, K, J, TK, DOT, PRECISION)
        products = tl.sum(dacross_JJ * products_JJ, 1)
        dstrength += products
        flows += products * strength
    dlower_JJ *= -tl.where(i[:, None] > i[None, :], decay(G, G, i, J), 0.0)
    dkeys_JJ = dlower_JJ * strength[:, None]
    dk = add_products(dk, (dkeys_JJ + tl.trans(dkeys_JJ)).to(DOT), own_rows, k_t, n, K, J, TK, DOT, PRECISION)
    products_JJ = dlower_JJ * multiply_rows(own_rows, own_rows, k_t, k_t, n, n, K, J, TK, DOT, PRECISION)
    dstrength += tl.sum(products_JJ, 1)
    products_JJ *= strength[:, None]
    flows += tl.sum(products_JJ, 1) - tl.sum(products_JJ, 0)
    tl.store(flow + own + i, flows)
    tl.store(dbeta_rows + i * db_t, dstrength.to(dbeta_rows.dtype.element_ty), mask=i < n)
    dscores_JJ = load_tile(dscores, own, own, C, J).to(tl.float32) * (decay(G, G, i, J) * scale)
    dscores_JJ = tl.trans(dscores_JJ.to(DOT))
    dk = add_products(dk, dscores_JJ, q_rows + own * q_t, q_t, n, K, J, TK, DOT, PRECISION)
    if LATER:
        dscores_JJ = load_tile(dscores, J, 0, C, J).to(tl.float32)
        dscores_JJ = tl.trans((dscores_JJ * (tl.exp2(G_later[:, None] - G[None, :]) * scale)).to(DOT))
        dk = add_products(dk, dscores_JJ, q_rows + J * q_t, q_t, n_later, K, J, TK, DOT, PRECISION)
    dk = through_writes(
        dk, inverse, v_rows, v_t, n, n_first, values, to_end[0], dslots, H,
        V, K, C, J, TK, BV, EARLIER, DOT, PRECISION,
    )  # fmt: skip
    dk = through_writes(
        dk, inverse, k_rows, k_t, n, n_first, keys, to_end[0], dtransitions, H,
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
        dbeta_rows, db_t, H, scale,
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
