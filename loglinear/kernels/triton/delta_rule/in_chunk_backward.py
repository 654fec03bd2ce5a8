"""Everything that stays inside a chunk, differentiated.

    S = Q K^T * dec,   T = S A,   [U | W] = A diag(b) [V | diag(exp(G)) K],   Er = -W,   Kd = diag(exp(Gam - G)) K
    O = (T diag(b) * LAM) V,   X = diag(exp(G)) Q + S Er,   S_z = Kd^T U,   P_z = exp(Gam) I + Kd^T Er

The queries' side, in rows of the chunk,

    dT = (dO V^T) * LAM diag(b),   dS = dT A^T + dX Er^T,   dQ = (dS * dec) K + diag(exp(G)) dX

what was written, in columns of [V | K], of which the transition's part lacks T^T dX, what the queries saw,

    [dY | dZ] = A^T Kd [dS_z | dP_z],   dV = diag(b) dY + (T diag(b) * LAM)^T dO

and the keys. A = (I + N)^-1 gives dN = -A^T dA A^T, and all that A is multiplied with is there already:

    dN = -tril(T^T dS + dY U^T + dZ Er^T, -1)
    d(diag(exp(G)) K) = -diag(b) (dZ + T^T dX),   dKd = U dS_z^T + Er dP_z^T
"""

# C chunk, I of its rows, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import (
    chunk_scales,
    decay,
    key_products,
    load_decays,
    load_strength,
    part_program,
    query_products,
)
from loglinear.kernels.triton.levels import sums_by_level
from loglinear.kernels.triton.tiles import (
    MIN_LOG_DECAY,
    SIZES,
    head_program,
    load_block,
    load_rows,
    locate,
    store_block,
    store_rows,
)


@triton.jit(do_not_specialize=SIZES)
def scores_backward_kernel(
    q, k, v, beta, level_scales, inverse, cumulative, effective, erased, dseen, do,
    dq, dscores, weights, flow, shares, dlevel_scales, table,
    T, N, H, R, L, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, l_b, l_t, l_h, o_b, o_t, o_h, dq_t, dl_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, PARTS: tl.constexpr,
    TK: tl.constexpr, BV: tl.constexpr,
    LINEAR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """C / PARTS rows of one chunk, one head: dq [B, T, H, K]; dS and the weights of V in O [chunk, H, C, C]; the
    columns of dlevel_scales up to LOG_C, adding to the last one where the walk shares it. Of the decays' gradient the
    rows' share, flow [chunk, H, C], and the columns'; of beta's the columns' share: shares [chunk, H, part, 2, C]."""
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    I: tl.constexpr = C // PARTS
    h, c, b, first, z, z0, sequence, n_keys, skipped, n = part_program(table, T, N, H, C, PARTS, PACKED)
    if n_keys <= 0:
        return
    row, part, last = c * H + h, skipped // I, L - 1
    i, j, token = skipped + tl.arange(0, I), tl.arange(0, C), b * T + first + skipped
    k_rows, v_rows = k + b * k_b + first * k_t + (h // R) * k_h, v + b * v_b + first * v_t + h * v_h
    q_rows = q + b * q_b + (first + skipped) * q_t + (h // R) * q_h
    do_rows = do + b * o_b + (first + skipped) * o_t + h * o_h
    tile_CC, tile_CK = row * (C * C), row * (C * K)

    pulled_IC = tl.zeros([I, C], tl.float32)
    for column in range(0, V, BV):
        do_IV = load_rows(do_rows, o_t, n, column, I, V, BV).to(DOT)
        v_CV = load_rows(v_rows, v_t, n_keys, column, C, V, BV).to(DOT)
        pulled_IC = tl.dot(do_IV, tl.trans(v_CV), pulled_IC, input_precision=PRECISION)
    scales = level_scales + b * l_b + first * l_t + h * l_h
    scales_IC = chunk_scales(scales, l_t, n_keys, L, i, DTYPE, C, LINEAR, DOT, PRECISION)
    strength = load_strength(beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n_keys, C)
    effective_IC = load_block(effective + tile_CC, skipped, 0, C, C, I, C).to(tl.float32)
    given_IC = pulled_IC * effective_IC
    shares += (row * PARTS + part) * (2 * C) + j
    tl.store(shares + C, tl.sum(given_IC * scales_IC, 0))
    given_IC *= strength[None, :]
    scales_IC *= strength[None, :]
    store_block(weights + tile_CC, skipped, 0, effective_IC * scales_IC, C, C, I, C)
    deffective_IC = (pulled_IC * scales_IC).to(DOT)
    to, inside = dlevel_scales + token * dl_t + h * L, tl.arange(0, I) < n
    if LINEAR:
        to += tl.arange(0, I) * dl_t
        held = tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, (held + tl.sum(given_IC, 1)).to(dlevel_scales.dtype.element_ty), mask=inside)
    else:
        column = tl.arange(0, 16)[None, :]
        to += (tl.arange(0, I) * dl_t)[:, None] + column
        sums_IL = sums_by_level(given_IC, i, L, I, C, LOG_C)
        shared = (inside & (last <= LOG_C))[:, None] & (column == last)
        sums_IL += tl.load(to, mask=shared, other=0.0).to(tl.float32)
        mask = inside[:, None] & (column <= tl.minimum(last, LOG_C))
        tl.store(to, sums_IL.to(dlevel_scales.dtype.element_ty), mask=mask)

    inverse_CC = tl.trans(load_block(inverse + tile_CC, 0, 0, C, C, C, C))
    dscores_IC = tl.dot(deffective_IC, inverse_CC, input_precision=PRECISION)
    for t in range(0, K, TK):
        dx_IT = load_block(dseen + tile_CK, skipped, t, C, K, I, TK)
        erased_CT = load_block(erased + tile_CK, 0, t, C, K, C, TK)
        dscores_IC = tl.dot(dx_IT, tl.trans(erased_CT), dscores_IC, input_precision=PRECISION)
    store_block(dscores + tile_CC, skipped, 0, dscores_IC, C, C, I, C)
    G, _ = load_decays(cumulative + row * C, C)
    G_rows = tl.load(cumulative + row * C + i)
    dscores_IC *= decay(G_rows, G, i, C) * scale
    flow_IC = dscores_IC * query_products(q_rows, k_rows, q_t, k_t, n, n_keys, K, I, C, TK, DOT, PRECISION)
    tl.store(shares, tl.sum(flow_IC, 0))
    flows = tl.sum(flow_IC, 1)
    dscores_IC = dscores_IC.to(DOT)
    for t in range(0, K, TK):
        dq_IT = load_block(dseen + tile_CK, skipped, t, C, K, I, TK).to(tl.float32) * (tl.exp2(G_rows) * scale)[:, None]
        flows += tl.sum(dq_IT * load_rows(q_rows, q_t, n, t, I, K, TK).to(tl.float32), 1)
        k_CT = load_rows(k_rows, k_t, n_keys, t, C, K, TK).to(DOT)
        dq_IT = tl.dot(dscores_IC, k_CT, dq_IT, input_precision=PRECISION)
        store_rows(dq + token * dq_t + h * K, dq_t, n, t, dq_IT, I, K, TK)
    tl.store(flow + row * C + i, flows)


@triton.jit(do_not_specialize=SIZES)
def writes_backward_kernel(
    k, v, beta, inverse, cumulative, weights, dstates, do, dwrites, dv, shares, table,
    T, N, H, R,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, o_b, o_t, o_h, dv_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    TRANSITION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head, one tile of columns: dY = A^T Kd dS_z, dwrites [chunk, H, C, V], with dv, and its share of
    beta's gradient, shares [chunk, H, tile, C]. TRANSITION: dZ, from the transition's gradient; V is K then."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, chunk = head_program(TILES, H)
    c, column = chunk.to(tl.int64), tile * BV
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    row = c * H + h
    k_rows = k + b * k_b + first * k_t + (h // R) * k_h
    dwritten_CV = tl.zeros([C, BV], tl.float32)
    for t in range(0, K, TK):
        k_CT = load_rows(k_rows, k_t, n, t, C, K, TK).to(DOT)
        dstate_TV = load_block(dstates + row * (K * V), t, column, K, V, TK, BV)
        dwritten_CV = tl.dot(k_CT, dstate_TV, dwritten_CV, input_precision=PRECISION)
    G, total = load_decays(cumulative + row * C, C)
    dwritten_CV = (dwritten_CV * tl.exp2(total - G)[:, None]).to(DOT)
    inverse_CC = tl.trans(load_block(inverse + row * (C * C), 0, 0, C, C, C, C))
    dwrites_CV = tl.dot(inverse_CC, dwritten_CV, input_precision=PRECISION)
    store_block(dwrites + row * (C * V), 0, column, dwrites_CV, C, V, C, BV)
    if not TRANSITION:
        v_CV = load_rows(v + b * v_b + first * v_t + h * v_h, v_t, n, column, C, V, BV).to(tl.float32)
        tl.store(shares + (row * TILES + tile) * C + tl.arange(0, C), tl.sum(dwrites_CV * v_CV, 1))
        strength = load_strength(beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n, C)
        weights_CC = tl.trans(load_block(weights + row * (C * C), 0, 0, C, C, C, C))
        do_CV = load_rows(do + b * o_b + first * o_t + h * o_h, o_t, n, column, C, V, BV).to(DOT)
        dv_CV = tl.dot(weights_CC, do_CV, dwrites_CV * strength[:, None], input_precision=PRECISION)
        store_rows(dv + (b * T + first) * dv_t + h * V, dv_t, n, column, dv_CV, C, V, BV)


@triton.jit(do_not_specialize=SIZES)
def keys_backward_kernel(
    q, k, beta, log_decay, cumulative, effective, written, erased, dslots, dtransitions, dseen, dscores, dwritten,
    dincoming, flow, query_shares, value_shares, dk, dbeta, dlog_decay, table,
    T, N, H, R, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, dk_t, db_t, dg_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, VALUE_TILES: tl.constexpr,
    TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head: dk [B, T, H, K], dbeta, dlog_decay. dwritten is dY, dincoming dZ."""
    _, h, chunk = head_program(1, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    i, row = tl.arange(0, C), c * H + h
    inside, token = i < n, b * T + first
    tile_CK, tile_CV, tile_CC = row * (C * K), row * (C * V), row * (C * C)
    q_rows, k_rows = q + b * q_b + first * q_t + (h // R) * q_h, k + b * k_b + first * k_t + (h // R) * k_h
    G, total = load_decays(cumulative + row * C, C)
    strength = load_strength(beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n, C)
    flows, dstrength = tl.load(flow + row * C + i), tl.zeros([C], tl.float32)
    for part in tl.static_range(PARTS):
        share = query_shares + (row * PARTS + part) * (2 * C) + i
        flows -= tl.load(share)
        dstrength += tl.load(share + C)
    for tile in tl.static_range(VALUE_TILES):
        dstrength += tl.load(value_shares + (row * VALUE_TILES + tile) * C + i)

    effective_CC = tl.trans(load_block(effective + tile_CC, 0, 0, C, C, C, C))
    dlower_CC = tl.dot(effective_CC, load_block(dscores + tile_CC, 0, 0, C, C, C, C), input_precision=PRECISION)
    for column in range(0, V, BV):
        dwritten_CV = load_block(dwritten + tile_CV, 0, column, C, V, C, BV)
        written_CV = load_block(written + tile_CV, 0, column, C, V, C, BV)
        dlower_CC = tl.dot(dwritten_CV, tl.trans(written_CV), dlower_CC, input_precision=PRECISION)
    for t in range(0, K, TK):
        dincoming_CT = load_block(dincoming + tile_CK, 0, t, C, K, C, TK)
        erased_CT = load_block(erased + tile_CK, 0, t, C, K, C, TK)
        dlower_CC = tl.dot(dincoming_CT, tl.trans(erased_CT), dlower_CC, input_precision=PRECISION)
    dlower_CC *= -tl.where(i[:, None] > i[None, :], decay(G, G, i, C), 0.0)
    keys_CC = dlower_CC * key_products(k_rows, k_t, n, k_rows, n, K, C, TK, DOT, PRECISION)
    dstrength += tl.sum(keys_CC, 1)
    keys_CC *= strength[:, None]
    flows += tl.sum(keys_CC, 1) - tl.sum(keys_CC, 0)
    dkeys_CC = (dlower_CC * strength[:, None]).to(DOT)
    tl.debug_barrier()  # nothing to wait for, but dS is loaded behind it and not kept from its product above
    dscores_CC = load_block(dscores + tile_CC, 0, 0, C, C, C, C).to(tl.float32)
    dscores_CC = tl.trans((dscores_CC * (decay(G, G, i, C) * scale)).to(DOT))
    # exp(Gam) I of the transition: the trace of its gradient.
    diagonal = dtransitions + row * (K * K)
    flow_total = tl.zeros([], tl.float32)
    for t in range(0, K, TK):
        x = t + tl.arange(0, TK)
        flow_total += tl.sum(tl.load(diagonal + x * (K + 1), mask=x < K, other=0.0).to(tl.float32), 0)
    flow_total *= tl.exp2(total)
    for t in range(0, K, TK):
        k_CT = load_rows(k_rows, k_t, n, t, C, K, TK).to(DOT)
        dk_CT = tl.zeros([C, TK], tl.float32)
        for column in range(0, V, BV):
            written_CV = load_block(written + tile_CV, 0, column, C, V, C, BV)
            dstate_TV = load_block(dslots + row * (K * V), t, column, K, V, TK, BV)
            dk_CT = tl.dot(written_CV, tl.trans(dstate_TV), dk_CT, input_precision=PRECISION)
        for s in range(0, K, TK):
            erased_CT = load_block(erased + tile_CK, 0, s, C, K, C, TK)
            dblock_TT = load_block(dtransitions + row * (K * K), t, s, K, K, TK, TK)
            dk_CT = tl.dot(erased_CT, tl.trans(dblock_TT), dk_CT, input_precision=PRECISION)
        dk_CT *= tl.exp2(total - G)[:, None]
        given = tl.sum(dk_CT * k_CT.to(tl.float32), 1)
        flow_total += tl.sum(given, 0)
        dread_CT = load_block(dincoming + tile_CK, 0, t, C, K, C, TK).to(tl.float32)
        dx_CT = load_block(dseen + tile_CK, 0, t, C, K, C, TK)
        dread_CT = tl.dot(effective_CC, dx_CT, dread_CT, input_precision=PRECISION) * -tl.exp2(G)[:, None]
        read = tl.sum(dread_CT * k_CT.to(tl.float32), 1)
        dstrength += read
        flows += read * strength - given
        dk_CT += dread_CT * strength[:, None]
        q_CT = load_rows(q_rows, q_t, n, t, C, K, TK).to(DOT)
        dk_CT = tl.dot(dscores_CC, q_CT, dk_CT, input_precision=PRECISION)
        dk_CT = tl.dot(dkeys_CC, k_CT, dk_CT, input_precision=PRECISION)
        dk_CT = tl.dot(tl.trans(dkeys_CC), k_CT, dk_CT, input_precision=PRECISION)
        store_rows(dk + token * dk_t + h * K, dk_t, n, t, dk_CT, C, K, TK)
    tl.store(dbeta + token * db_t + h + i * db_t, dstrength.to(dbeta.dtype.element_ty), mask=inside)
    # G_i is a sum over the tokens up to i; what crosses the whole chunk flows across all of them.
    dg = tl.cumsum(tl.where(inside, flows, 0.0), 0, reverse=True) + flow_total
    g = tl.load(log_decay + b * g_b + first * g_t + h * g_h + i * g_t, mask=inside, other=0.0).to(tl.float32)
    dg = tl.where(g < MIN_LOG_DECAY, 0.0, dg)
    tl.store(dlog_decay + token * dg_t + h + i * dg_t, dg.to(dlog_decay.dtype.element_ty), mask=inside)
