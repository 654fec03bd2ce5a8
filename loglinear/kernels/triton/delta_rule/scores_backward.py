"""Everything that stays inside a chunk, differentiated: the queries' side, in rows of the chunk.

    S = Q K^T * dec,   T = S A,   O = (T * LAM) diag(b) V,   X = diag(exp(G)) Q - T diag(b exp(G)) K

    dT = (dO V^T * LAM - dX K^T diag(exp(G))) diag(b),   dS = dT A^T,   dQ = (dS * dec) K + diag(exp(G)) dX

A chunk of 128 is two parts of 64 tokens; tiles above the diagonal are neither computed nor read.
"""

# C chunk, J tokens of a part, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.delta_rule.in_chunk import is_level, load_part, load_tile, multiply_rows, own_scales
from loglinear.kernels.triton.delta_rule.tiles import SIZES, decay, load_strength, part_program
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import load_rows, store_block, store_rows


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
    LINEAR: tl.constexpr, DTYPE: tl.constexpr, MATH: tl.constexpr,
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
        pulled_JJ = multiply_rows(do_rows, v_rows, o_t, v_t, n, n_first, V, J, BV, MATH)
        pulled_JJ *= strength[None, :]
        across = tl.sum(pulled_JJ * load_tile(effective, own, 0, C, J).to(tl.float32), 1)
        pulled_JJ *= prefetched(load_scale(scales, l_t, n, LOG_C, L, i), DTYPE)[:, None]
        read_JJ = multiply_rows(dseen_rows, k_rows, K, k_t, n, n_first, K, J, TK, MATH)
        deffective_JJ = (pulled_JJ - read_JJ * (strength * tl.exp2(G_first))[None, :]).to(MATH.dot)
        inverse_JJ = tl.trans(load_tile(inverse, own, 0, C, J))
        dscores_own = tl.dot(deffective_JJ, inverse_JJ, dscores_own, input_precision=MATH.precision)
        inverse_JJ = tl.trans(load_tile(inverse, 0, 0, C, J))
        dscores_JJ = tl.dot(deffective_JJ, inverse_JJ, input_precision=MATH.precision)
        store_block(dscores, own, 0, dscores_JJ, C, C, J, J)
        flow_JJ = dscores_JJ * (tl.exp2(G_own[:, None] - G_first[None, :]) * scale)
        flow_JJ *= multiply_rows(q_rows, k_rows, q_t, k_t, n, n_first, K, J, TK, MATH)
        tl.store(shares + i, tl.sum(flow_JJ, 0))
        flows += tl.sum(flow_JJ, 1)

    strength = load_strength(beta + own * beta_t, beta_t, n, J)
    pulled_JJ = multiply_rows(do_rows, own_values, o_t, v_t, n, n, V, J, BV, MATH) * strength[None, :]
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
    read_JJ = multiply_rows(dseen_rows, own_rows, K, k_t, n, n, K, J, TK, MATH)
    deffective_JJ = (pulled_JJ - read_JJ * (strength * tl.exp2(G_own))[None, :]).to(MATH.dot)
    inverse_JJ = tl.trans(load_tile(inverse, own, own, C, J))
    dscores_own = tl.dot(deffective_JJ, inverse_JJ, dscores_own, input_precision=MATH.precision)
    store_block(dscores, own, own, dscores_own, C, C, J, J)
    flow_JJ = dscores_own * (decay(G_own, G_own, i, J) * scale)
    flow_JJ *= multiply_rows(q_rows, own_rows, q_t, k_t, n, n, K, J, TK, MATH)
    tl.store(shares + own + i, tl.sum(flow_JJ, 0))
    flows += tl.sum(flow_JJ, 1)

    tl.debug_barrier()  # dS as it was stored
    dscores_own = load_tile(dscores, own, own, C, J).to(tl.float32) * (decay(G_own, G_own, i, J) * scale)
    dscores_own = dscores_own.to(MATH.dot)
    if EARLIER:
        dscores_first = load_tile(dscores, own, 0, C, J).to(tl.float32)
        dscores_first = (dscores_first * (tl.exp2(G_own[:, None] - G_first[None, :]) * scale)).to(MATH.dot)
    for t in range(0, K, TK):
        dq_JT = load_rows(dseen_rows, K, n, t, J, K, TK).to(tl.float32) * (tl.exp2(G_own) * scale)[:, None]
        flows += tl.sum(dq_JT * load_rows(q_rows, q_t, n, t, J, K, TK).to(tl.float32), 1)
        k_JT = load_rows(own_rows, k_t, n, t, J, K, TK).to(MATH.dot)
        dq_JT = tl.dot(dscores_own, k_JT, dq_JT, input_precision=MATH.precision)
        if EARLIER:
            k_JT = load_rows(k_rows, k_t, n_first, t, J, K, TK).to(MATH.dot)
            dq_JT = tl.dot(dscores_first, k_JT, dq_JT, input_precision=MATH.precision)
        store_rows(dq_rows, dq_t, n, t, dq_JT, J, K, TK)
    tl.store(flow + own + i, flows)


@triton.jit(do_not_specialize=SIZES)
def scores_backward_kernel(
    q, k, v, beta, level_scales, inverse, cumulative, effective, dseen, do,
    dq, dscores, flow, shares, dlevel_scales, table,
    T, N, H, R, L, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, l_b, l_t, l_h, o_b, o_t, o_h, dq_t, dl_t, a_c,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, PARTS: tl.constexpr,
    TK: tl.constexpr, BV: tl.constexpr,
    LINEAR: tl.constexpr, MATH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """C / PARTS rows of one chunk, one head: dq [B, T, H, K]; dS [chunk, H, C, C]; the columns of dlevel_scales
    up to LOG_C, adding to the last one where the walk shares it. Of the decays' gradient the rows' share,
    flow [chunk, H, C], and the columns', shares [chunk, H, 0, part, C]: of those that the part reads."""
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
    inverse, effective = inverse + c * a_c + h * (C * C), effective + row * (C * C)
    dscores, dseen_rows = dscores + row * (C * C), dseen + (row * C + own) * K
    G, flow, shares = cumulative + row * C, flow + row * C, shares + (row * (2 * PARTS) + own // J) * C
    arguments = (
        q_rows, q_t, k_rows, k_t, v_rows, v_t, do_rows, o_t, dseen_rows, n, n_keys, beta, beta_t, scales, l_t, L, G,
        inverse, effective, dscores, dq_rows, dq_t, flow, shares, to_dscales, dl_t, scale,
    )  # fmt: skip
    if own == 0:
        scores_part(arguments, K, V, C, J, LOG_C, TK, BV, False, LINEAR, DTYPE, MATH)
    elif PARTS > 1:
        scores_part(arguments, K, V, C, J, LOG_C, TK, BV, True, LINEAR, DTYPE, MATH)
