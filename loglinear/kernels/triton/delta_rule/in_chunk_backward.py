"""Everything that stays inside a chunk, differentiated.

    E = (Q K^T * dec) Ab,   U = Ab V,   W = Ab diag(exp(G)) K,   Kd = diag(exp(Gam - G)) K
    O = (E * LAM) V,        X = diag(exp(G)) Q - (Q K^T * dec) W
    S_z = Kd^T U,           P_z = exp(Gam) I - Kd^T W

Two stages. What needs all of V:

    dE = dO V^T * LAM,   dU = Kd dS,   dV = (E * LAM)^T dO + Ab^T dU,   dlambda = sums of dO V^T * E
    kept for the second: dscores = dE Ab^T,  dwrite = (Q K^T * dec)^T dE + dU V^T,  doutgoing = U dS^T

and the rest:

    dW = -Kd dP - (Q K^T * dec)^T dX,    dKd = doutgoing - W dP^T,    d(diag(exp(G)) K) = Ab^T dW
    d(Q K^T * dec) = dscores - dX W^T,   dAb = dwrite + dW K^T diag(exp(G))
    Ab = A diag(b),  A = (I + N)^-1:     dN = -tril(A^T dA A^T, -1)
"""

# C chunk, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import decay, key_products, load_decays, load_write
from loglinear.kernels.triton.delta_rule.walk_backward import load_tiles
from loglinear.kernels.triton.levels import (
    by_level,
    far_classes,
    level_sums,
    load_class_scales,
    near_classes,
    spread_scales,
)
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


@triton.jit
def query_products(
    q_rows, k_rows, q_t, k_t, n, G, scale,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Q K^T * dec, times scale."""
    scores_CC = tl.zeros([C, C], tl.float32)
    for kt in tl.static_range(0, K, TK):
        q_CT = load_rows(q_rows, q_t, n, kt, C, K, TK).to(DOT)
        k_CT = load_rows(k_rows, k_t, n, kt, C, K, TK).to(DOT)
        scores_CC = tl.dot(q_CT, tl.trans(k_CT), scores_CC, input_precision=PRECISION)
    return scores_CC * (decay(G, C) * scale)


@triton.jit(do_not_specialize=SIZES)
def values_backward_kernel(
    q, k, v, beta, level_scales, inverse, cumulative, dslots, do, dv, dscores, dwrite, doutgoing, dlevel_scales, table,
    T, N, H, R, L, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, l_b, l_t, l_h, o_b, o_t, o_h, dv_t, dl_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    TK: tl.constexpr, BV: tl.constexpr, LINEAR: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head: dv, dscores and dwrite [chunk, H, C, C], doutgoing [chunk, H, C, K], and the columns of
    dlevel_scales up to LOG_C, adding to the last one where the walk shares it."""
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    _, h, chunk = head_program(1, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    i, row, last = tl.arange(0, C), c * H + h, L - 1
    q_rows, k_rows = q + b * q_b + first * q_t + (h // R) * q_h, k + b * k_b + first * k_t + (h // R) * k_h
    v_rows, do_rows = v + b * v_b + first * v_t + h * v_h, do + b * o_b + first * o_t + h * o_h
    dslot = dslots + row * (K * V)
    G, total = load_decays(cumulative + row * C, C)
    to_end = tl.exp2(total - G)[:, None]
    write_CC = load_write(
        inverse + row * (C * C), beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n, C, DOT
    )
    scores_CC = query_products(q_rows, k_rows, q_t, k_t, n, G, scale, K, C, TK, DOT, PRECISION).to(DOT)
    effective_CC = tl.dot(scores_CC, write_CC, input_precision=PRECISION)
    lambdas = load_class_scales(level_scales + b * l_b + first * l_t + h * l_h, l_t, n, L, 0, i, LINEAR)
    near_JC, far_JC = near_classes(C).to(tl.float32).to(DOT), far_classes(C).to(tl.float32).to(DOT)
    scales_CC = spread_scales(lambdas, near_JC, far_JC, i, DTYPE, C, LINEAR, DOT, PRECISION)
    scales_CC = tl.where(i[:, None] >= i[None, :], scales_CC, 0.0)
    weights_CC = (effective_CC * scales_CC).to(DOT)
    pulled_CC = tl.zeros([C, C], tl.float32)
    dwrite_CC = tl.zeros([C, C], tl.float32)
    for column in range(0, V, BV):
        v_CV = load_rows(v_rows, v_t, n, column, C, V, BV).to(DOT)
        do_CV = load_rows(do_rows, o_t, n, column, C, V, BV).to(DOT)
        pulled_CC = tl.dot(do_CV, tl.trans(v_CV), pulled_CC, input_precision=PRECISION)
        dwritten_CV = tl.zeros([C, BV], tl.float32)
        for kt in range(0, K, TK):
            outgoing_CT = (load_rows(k_rows, k_t, n, kt, C, K, TK).to(tl.float32) * to_end).to(DOT)
            dstate_TV = load_block(dslot, kt, column, K, V, TK, BV)
            dwritten_CV = tl.dot(outgoing_CT, dstate_TV, dwritten_CV, input_precision=PRECISION)
        dwritten_CV = dwritten_CV.to(DOT)
        dwrite_CC = tl.dot(dwritten_CV, tl.trans(v_CV), dwrite_CC, input_precision=PRECISION)
        dv_CV = tl.dot(tl.trans(weights_CC), do_CV, input_precision=PRECISION)
        dv_CV = tl.dot(tl.trans(write_CC), dwritten_CV, dv_CV, input_precision=PRECISION)
        store_rows(dv + (b * T + first) * dv_t + h * V, dv_t, n, column, dv_CV, C, V, BV)
    deffective_CC = (pulled_CC * scales_CC).to(DOT)
    dscores_CC = tl.dot(deffective_CC, tl.trans(write_CC), input_precision=PRECISION)
    dwrite_CC = tl.dot(tl.trans(scores_CC), deffective_CC, dwrite_CC, input_precision=PRECISION)
    store_block(dscores + row * (C * C), 0, 0, dscores_CC, C, C, C, C)
    store_block(dwrite + row * (C * C), 0, 0, dwrite_CC, C, C, C, C)
    for kt in range(0, K, TK):
        doutgoing_CT = tl.zeros([C, TK], tl.float32)
        for column in range(0, V, BV):
            v_CV = load_rows(v_rows, v_t, n, column, C, V, BV).to(DOT)
            written_CV = tl.dot(write_CC, v_CV, input_precision=PRECISION).to(DOT)
            dstate_TV = load_block(dslot, kt, column, K, V, TK, BV)
            doutgoing_CT = tl.dot(written_CV, tl.trans(dstate_TV), doutgoing_CT, input_precision=PRECISION)
        store_block(doutgoing + row * (C * K), 0, kt, doutgoing_CT, C, K, C, TK)
    pulled_CC = tl.where(i[:, None] >= i[None, :], pulled_CC * effective_CC, 0.0)
    to = dlevel_scales + (b * T + first) * dl_t + h * L
    if LINEAR:
        held = tl.load(to + i * dl_t, mask=i < n, other=0.0).to(tl.float32)
        tl.store(to + i * dl_t, (held + tl.sum(pulled_CC, 1)).to(dlevel_scales.dtype.element_ty), mask=i < n)
    else:
        column = tl.arange(0, 16)[None, :]
        to += (i * dl_t)[:, None] + column
        sums_CL = by_level(level_sums(pulled_CC, near_JC, far_JC, i, C, DOT, PRECISION), i, L, C, LOG_C)
        shared = (i < tl.where(last <= LOG_C, n, 0))[:, None] & (column == last)
        sums_CL += tl.load(to, mask=shared, other=0.0).to(tl.float32)
        mask = (i < n)[:, None] & (column <= tl.minimum(last, LOG_C))
        tl.store(to, sums_CL.to(dlevel_scales.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def keys_backward_kernel(
    q, k, beta, log_decay, inverse, cumulative, dtransitions, dseen, dscores, dwrite, doutgoing,
    dq, dk, dbeta, dlog_decay, table,
    T, N, H, R, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, db_t, dg_t,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head: dq, dk [B, T, H, K], dbeta, dlog_decay."""
    TILES: tl.constexpr = (K + TK - 1) // TK
    _, h, chunk = head_program(1, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    i, row = tl.arange(0, C), c * H + h
    inside, lower = i < n, i[:, None] > i[None, :]
    q_rows, k_rows = q + b * q_b + first * q_t + (h // R) * q_h, k + b * k_b + first * k_t + (h // R) * k_h
    G, total = load_decays(cumulative + row * C, C)
    from_start, to_end, across = tl.exp2(G)[:, None], tl.exp2(total - G)[:, None], tl.exp2(total)
    strength = tl.load(beta + b * beta_b + first * beta_t + h * beta_h + i * beta_t, mask=inside, other=0.0)
    strength = strength.to(tl.float32)
    inverse_CC = load_block(inverse + row * (C * C), 0, 0, C, C, C, C)
    write_CC = (inverse_CC.to(tl.float32) * strength[None, :]).to(DOT)
    scores_CC = query_products(q_rows, k_rows, q_t, k_t, n, G, scale, K, C, TK, DOT, PRECISION)
    dscores_CC = load_block(dscores + row * (C * C), 0, 0, C, C, C, C).to(tl.float32)
    dwrite_CC = load_block(dwrite + row * (C * C), 0, 0, C, C, C, C).to(tl.float32)
    dx = load_tiles(dseen + row * (C * K), K, C, TK)
    dtransition = dtransitions + row * (K * K)
    dincoming = ()  # of diag(exp(G)) K
    for t in tl.static_range(TILES):
        derase_CT = -tl.dot(tl.trans(scores_CC.to(DOT)), dx[t], input_precision=PRECISION)
        for s in tl.static_range(TILES):
            outgoing_CT = (load_rows(k_rows, k_t, n, s * TK, C, K, TK).to(tl.float32) * to_end).to(DOT)
            block_TT = load_block(dtransition, s * TK, t * TK, K, K, TK, TK)
            derase_CT -= tl.dot(outgoing_CT, block_TT, input_precision=PRECISION)
        derase_CT = derase_CT.to(DOT)
        incoming_CT = (load_rows(k_rows, k_t, n, t * TK, C, K, TK).to(tl.float32) * from_start).to(DOT)
        erase_CT = tl.dot(write_CC, incoming_CT, input_precision=PRECISION).to(DOT)
        dscores_CC -= tl.dot(dx[t], tl.trans(erase_CT), input_precision=PRECISION)
        dwrite_CC = tl.dot(derase_CT, tl.trans(incoming_CT), dwrite_CC, input_precision=PRECISION)
        dincoming = dincoming + (tl.dot(tl.trans(write_CC), derase_CT, input_precision=PRECISION).to(DOT),)

    keys_CC = key_products(k_rows, k_t, n, G, K, C, TK, DOT, PRECISION)
    dstrength = tl.sum(dwrite_CC * inverse_CC.to(tl.float32), 0)
    dinverse_CC = (dwrite_CC * strength[None, :]).to(DOT)
    inverse_CC = inverse_CC.to(DOT)
    half_CC = tl.dot(tl.trans(inverse_CC), dinverse_CC, input_precision=PRECISION).to(DOT)
    dlower_CC = tl.where(lower, -tl.dot(half_CC, tl.trans(inverse_CC), input_precision=PRECISION), 0.0)
    dstrength += tl.sum(dlower_CC * keys_CC, 1)
    dkeys_CC = dlower_CC * strength[:, None]
    flow_CC = dscores_CC * scores_CC + dkeys_CC * keys_CC
    flow = tl.sum(flow_CC, 1) - tl.sum(flow_CC, 0)
    decay_CC = decay(G, C)
    dscores_CC = (dscores_CC * (decay_CC * scale)).to(DOT)
    dkeys_CC = (dkeys_CC * decay_CC).to(DOT)
    flow_total = tl.zeros([], tl.float32)
    for t in tl.static_range(TILES):
        q_CT = load_rows(q_rows, q_t, n, t * TK, C, K, TK).to(DOT)
        k_CT = load_rows(k_rows, k_t, n, t * TK, C, K, TK).to(DOT)
        dq_CT = dx[t].to(tl.float32) * (from_start * scale)
        flow += tl.sum(dq_CT * q_CT.to(tl.float32), 1)
        dq_CT = tl.dot(dscores_CC, k_CT, dq_CT, input_precision=PRECISION)
        store_rows(dq + ((b * T + first) * H + h) * K, H * K, n, t * TK, dq_CT, C, K, TK)
        doutgoing_CT = load_block(doutgoing + row * (C * K), 0, t * TK, C, K, C, TK).to(tl.float32)
        for s in tl.static_range(TILES):
            incoming_CT = (load_rows(k_rows, k_t, n, s * TK, C, K, TK).to(tl.float32) * from_start).to(DOT)
            erase_CT = tl.dot(write_CC, incoming_CT, input_precision=PRECISION).to(DOT)
            block_TT = load_block(dtransition, t * TK, s * TK, K, K, TK, TK)
            doutgoing_CT -= tl.dot(erase_CT, tl.trans(block_TT), input_precision=PRECISION)
            if s == t:
                x = tl.arange(0, TK)
                diagonal = tl.where(x[:, None] == x[None, :], block_TT.to(tl.float32), 0.0)
                flow_total += across * tl.sum(tl.sum(diagonal, 1), 0)
        dk_CT = doutgoing_CT * to_end
        given = tl.sum(dk_CT * k_CT.to(tl.float32), 1)
        flow_total += tl.sum(given, 0)
        dread_CT = dincoming[t].to(tl.float32) * from_start
        flow += tl.sum(dread_CT * k_CT.to(tl.float32), 1) - given
        dk_CT = tl.dot(tl.trans(dscores_CC), q_CT, dk_CT + dread_CT, input_precision=PRECISION)
        dk_CT = tl.dot(dkeys_CC, k_CT, dk_CT, input_precision=PRECISION)
        dk_CT = tl.dot(tl.trans(dkeys_CC), k_CT, dk_CT, input_precision=PRECISION)
        store_rows(dk + ((b * T + first) * H + h) * K, H * K, n, t * TK, dk_CT, C, K, TK)
    token = b * T + first
    tl.store(dbeta + token * db_t + h + i * db_t, dstrength.to(dbeta.dtype.element_ty), mask=inside)
    # G_i is a sum over the tokens up to i; what crosses the whole chunk flows across all of them.
    dg = tl.cumsum(tl.where(inside, flow, 0.0), 0, reverse=True) + flow_total
    g = tl.load(log_decay + b * g_b + first * g_t + h * g_h + i * g_t, mask=inside, other=0.0).to(tl.float32)
    dg = tl.where(g < MIN_LOG_DECAY, 0.0, dg)
    tl.store(dlog_decay + token * dg_t + h + i * dg_t, dg.to(dlog_decay.dtype.element_ty), mask=inside)
