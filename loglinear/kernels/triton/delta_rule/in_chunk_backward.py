"""Everything that stays inside a chunk, differentiated.

    E = (Q K^T * dec) Ab,   U = Ab V,   W = Ab diag(exp(G)) K,   Kd = diag(exp(Gam - G)) K
    O = (E * LAM) V,        X = diag(exp(G)) Q - (Q K^T * dec) W
    S_z = Kd^T U,           P_z = exp(Gam) I - Kd^T W

Three stages, each with what fits the registers. What needs all of V:

    dU = Kd dS,   dV = (E * LAM)^T dO + Ab^T dU,   pulled = dO V^T,   dAb = dU V^T,   dKd = U dS^T

what needs the transition's gradient,

    dE = pulled * LAM,   dlambda = sums of pulled * E,   dW = -Kd dP - (Q K^T * dec)^T dX
    d(Q K^T * dec) = dE Ab^T - dX W^T,   dAb += (Q K^T * dec)^T dE + dW K^T diag(exp(G)),   dKd -= W dP^T
    d(diag(exp(G)) K) = Ab^T dW

and the tokens: Ab = A diag(b), A = (I + N)^-1 gives dN = -tril(A^T dA A^T, -1).
"""

# C chunk, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import decay, key_products, load_decays, load_write
from loglinear.kernels.triton.levels import (
    far_classes,
    load_class_scales,
    near_classes,
    spread_scales,
    sums_by_level,
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


@triton.jit
def chunk_scales(
    scales, l_t, n, L,
    DTYPE: tl.constexpr, C: tl.constexpr, LINEAR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """LAM of one chunk and head, its lower triangle."""
    i = tl.arange(0, C)
    lambdas = load_class_scales(scales, l_t, n, L, 0, i, LINEAR)
    near_JC, far_JC = near_classes(C).to(tl.float32).to(DOT), far_classes(C).to(tl.float32).to(DOT)
    scales_CC = spread_scales(lambdas, near_JC, far_JC, i, DTYPE, C, LINEAR, DOT, PRECISION)
    return tl.where(i[:, None] >= i[None, :], scales_CC, 0.0)


@triton.jit(do_not_specialize=SIZES)
def values_backward_kernel(
    q, k, v, beta, level_scales, inverse, cumulative, dslots, do, dv, pulled, dwrite, doutgoing, table,
    T, N, H, R, L, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, l_b, l_t, l_h, o_b, o_t, o_h, dv_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, LINEAR: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head: dv, pulled and dwrite [chunk, H, C, C], doutgoing [chunk, H, C, K]."""
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    _, h, chunk = head_program(1, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    row = c * H + h
    q_rows, k_rows = q + b * q_b + first * q_t + (h // R) * q_h, k + b * k_b + first * k_t + (h // R) * k_h
    v_rows, do_rows = v + b * v_b + first * v_t + h * v_h, do + b * o_b + first * o_t + h * o_h
    dslot = dslots + row * (K * V)
    G, total = load_decays(cumulative + row * C, C)
    to_end = tl.exp2(total - G)[:, None]
    write_CC = load_write(inverse + row * (C * C), beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n, C, DOT)
    scores_CC = query_products(q_rows, k_rows, q_t, k_t, n, G, scale, K, C, TK, DOT, PRECISION).to(DOT)
    effective_CC = tl.dot(scores_CC, write_CC, input_precision=PRECISION)
    scales = level_scales + b * l_b + first * l_t + h * l_h
    scales_CC = chunk_scales(scales, l_t, n, L, DTYPE, C, LINEAR, DOT, PRECISION)
    weights_CC = (effective_CC * scales_CC).to(DOT)
    pulled_CC = tl.zeros([C, C], tl.float32)
    dwrite_CC = tl.zeros([C, C], tl.float32)
    for column in range(0, V, BV):
        v_CV = load_rows(v_rows, v_t, n, column, C, V, BV).to(DOT)
        dwritten_CV = tl.zeros([C, BV], tl.float32)
        for kt in range(0, K, TK):
            outgoing_CT = (load_rows(k_rows, k_t, n, kt, C, K, TK).to(tl.float32) * to_end).to(DOT)
            dstate_TV = load_block(dslot, kt, column, K, V, TK, BV)
            dwritten_CV = tl.dot(outgoing_CT, dstate_TV, dwritten_CV, input_precision=PRECISION)
        dwritten_CV = dwritten_CV.to(DOT)
        dwrite_CC = tl.dot(dwritten_CV, tl.trans(v_CV), dwrite_CC, input_precision=PRECISION)
        do_CV = load_rows(do_rows, o_t, n, column, C, V, BV).to(DOT)
        pulled_CC = tl.dot(do_CV, tl.trans(v_CV), pulled_CC, input_precision=PRECISION)
        dv_CV = tl.dot(tl.trans(weights_CC), do_CV, input_precision=PRECISION)
        dv_CV = tl.dot(tl.trans(write_CC), dwritten_CV, dv_CV, input_precision=PRECISION)
        store_rows(dv + (b * T + first) * dv_t + h * V, dv_t, n, column, dv_CV, C, V, BV)
    store_block(pulled + row * (C * C), 0, 0, pulled_CC, C, C, C, C)
    store_block(dwrite + row * (C * C), 0, 0, dwrite_CC, C, C, C, C)
    for kt in range(0, K, TK):
        doutgoing_CT = tl.zeros([C, TK], tl.float32)
        for column in range(0, V, BV):
            v_CV = load_rows(v_rows, v_t, n, column, C, V, BV).to(DOT)
            written_CV = tl.dot(write_CC, v_CV, input_precision=PRECISION).to(DOT)
            dstate_TV = load_block(dslot, kt, column, K, V, TK, BV)
            doutgoing_CT = tl.dot(written_CV, tl.trans(dstate_TV), doutgoing_CT, input_precision=PRECISION)
        store_block(doutgoing + row * (C * K), 0, kt, doutgoing_CT, C, K, C, TK)


@triton.jit(do_not_specialize=SIZES)
def scores_backward_kernel(
    q, k, beta, level_scales, inverse, cumulative, dtransitions, dseen, pulled,
    dscores, dwrite, dincoming, doutgoing, dlevel_scales, table,
    T, N, H, R, L, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, l_b, l_t, l_h, dl_t,
    K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, TK: tl.constexpr, LINEAR: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head: dscores [chunk, H, C, C] and dincoming [chunk, H, C, K]; adds to dwrite and doutgoing, and
    the columns of dlevel_scales up to LOG_C, adding to the last one where the walk shares it."""
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    _, h, chunk = head_program(1, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    i, row, last = tl.arange(0, C), c * H + h, L - 1
    q_rows, k_rows = q + b * q_b + first * q_t + (h // R) * q_h, k + b * k_b + first * k_t + (h // R) * k_h
    G, total = load_decays(cumulative + row * C, C)
    from_start, to_end = tl.exp2(G)[:, None], tl.exp2(total - G)[:, None]
    write_CC = load_write(inverse + row * (C * C), beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n, C, DOT)
    scores_CC = query_products(q_rows, k_rows, q_t, k_t, n, G, scale, K, C, TK, DOT, PRECISION).to(DOT)
    scales = level_scales + b * l_b + first * l_t + h * l_h
    pulled_CC = load_block(pulled + row * (C * C), 0, 0, C, C, C, C)
    deffective_CC = (pulled_CC * chunk_scales(scales, l_t, n, L, DTYPE, C, LINEAR, DOT, PRECISION)).to(DOT)
    pulled_CC *= tl.dot(scores_CC, write_CC, input_precision=PRECISION)
    pulled_CC = tl.where(i[:, None] >= i[None, :], pulled_CC, 0.0)
    to = dlevel_scales + (b * T + first) * dl_t + h * L
    if LINEAR:
        held = tl.load(to + i * dl_t, mask=i < n, other=0.0).to(tl.float32)
        tl.store(to + i * dl_t, (held + tl.sum(pulled_CC, 1)).to(dlevel_scales.dtype.element_ty), mask=i < n)
    else:
        column = tl.arange(0, 16)[None, :]
        to += (i * dl_t)[:, None] + column
        sums_CL = sums_by_level(pulled_CC, i, L, C, LOG_C)
        shared = (i < tl.where(last <= LOG_C, n, 0))[:, None] & (column == last)
        sums_CL += tl.load(to, mask=shared, other=0.0).to(tl.float32)
        mask = (i < n)[:, None] & (column <= tl.minimum(last, LOG_C))
        tl.store(to, sums_CL.to(dlevel_scales.dtype.element_ty), mask=mask)

    dscores_CC = tl.dot(deffective_CC, tl.trans(write_CC), input_precision=PRECISION)
    dwrite_CC = load_block(dwrite + row * (C * C), 0, 0, C, C, C, C).to(tl.float32)
    dwrite_CC = tl.dot(tl.trans(scores_CC), deffective_CC, dwrite_CC, input_precision=PRECISION)
    dtransition, tile = dtransitions + row * (K * K), row * (C * K)
    for t in range(0, K, TK):
        dx_CT = load_block(dseen + tile, 0, t, C, K, C, TK)
        derase_CT = tl.dot(tl.trans(scores_CC), dx_CT, input_precision=PRECISION)
        incoming_CT = (load_rows(k_rows, k_t, n, t, C, K, TK).to(tl.float32) * from_start).to(DOT)
        erase_CT = tl.dot(write_CC, incoming_CT, input_precision=PRECISION).to(DOT)
        dscores_CC -= tl.dot(dx_CT, tl.trans(erase_CT), input_precision=PRECISION)
        for s in range(0, K, TK):
            outgoing_CT = (load_rows(k_rows, k_t, n, s, C, K, TK).to(tl.float32) * to_end).to(DOT)
            block_TT = load_block(dtransition, s, t, K, K, TK, TK)
            derase_CT = tl.dot(outgoing_CT, block_TT, derase_CT, input_precision=PRECISION)
        derase_CT = (-derase_CT).to(DOT)
        dwrite_CC = tl.dot(derase_CT, tl.trans(incoming_CT), dwrite_CC, input_precision=PRECISION)
        dincoming_CT = tl.dot(tl.trans(write_CC), derase_CT, input_precision=PRECISION)
        store_block(dincoming + tile, 0, t, dincoming_CT, C, K, C, TK)
    store_block(dscores + row * (C * C), 0, 0, dscores_CC, C, C, C, C)
    store_block(dwrite + row * (C * C), 0, 0, dwrite_CC, C, C, C, C)
    for t in range(0, K, TK):
        doutgoing_CT = load_block(doutgoing + tile, 0, t, C, K, C, TK).to(tl.float32)
        for s in range(0, K, TK):
            incoming_CT = (load_rows(k_rows, k_t, n, s, C, K, TK).to(tl.float32) * from_start).to(DOT)
            erase_CT = tl.dot(write_CC, incoming_CT, input_precision=PRECISION).to(DOT)
            block_TT = load_block(dtransition, t, s, K, K, TK, TK)
            doutgoing_CT -= tl.dot(erase_CT, tl.trans(block_TT), input_precision=PRECISION)
        store_block(doutgoing + tile, 0, t, doutgoing_CT, C, K, C, TK)


@triton.jit(do_not_specialize=SIZES)
def keys_backward_kernel(
    q, k, beta, log_decay, inverse, cumulative, dtransitions, dseen, dscores, dwrite, dincoming, doutgoing,
    dq, dk, dbeta, dlog_decay, table,
    T, N, H, R, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, db_t, dg_t,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head: dq, dk [B, T, H, K], dbeta, dlog_decay."""
    _, h, chunk = head_program(1, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    i, row = tl.arange(0, C), c * H + h
    inside, tile, tile_CC, token = i < n, row * (C * K), row * (C * C), b * T + first
    q_rows, k_rows = q + b * q_b + first * q_t + (h // R) * q_h, k + b * k_b + first * k_t + (h // R) * k_h
    G, total = load_decays(cumulative + row * C, C)
    strength = tl.load(beta + b * beta_b + first * beta_t + h * beta_h + i * beta_t, mask=inside, other=0.0)
    strength = strength.to(tl.float32)
    inverse_CC = load_block(inverse + tile_CC, 0, 0, C, C, C, C)
    dwrite_CC = load_block(dwrite + tile_CC, 0, 0, C, C, C, C).to(tl.float32)
    dstrength = tl.sum(dwrite_CC * inverse_CC.to(tl.float32), 0)
    half_CC = tl.dot(tl.trans(inverse_CC), (dwrite_CC * strength[None, :]).to(DOT), input_precision=PRECISION)
    dlower_CC = -tl.dot(half_CC.to(DOT), tl.trans(inverse_CC), input_precision=PRECISION)
    dlower_CC = tl.where(i[:, None] > i[None, :], dlower_CC, 0.0)
    keys_CC = key_products(k_rows, k_t, n, G, K, C, TK, DOT, PRECISION)
    dstrength += tl.sum(dlower_CC * keys_CC, 1)
    tl.store(dbeta + token * db_t + h + i * db_t, dstrength.to(dbeta.dtype.element_ty), mask=inside)
    dkeys_CC = dlower_CC * strength[:, None]
    flow_CC = dkeys_CC * keys_CC
    dkeys_CC = (dkeys_CC * decay(G, C)).to(DOT)
    dscores_CC = load_block(dscores + tile_CC, 0, 0, C, C, C, C).to(tl.float32)
    flow_CC += dscores_CC * query_products(q_rows, k_rows, q_t, k_t, n, G, scale, K, C, TK, DOT, PRECISION)
    dscores_CC = (dscores_CC * (decay(G, C) * scale)).to(DOT)
    flow = tl.sum(flow_CC, 1) - tl.sum(flow_CC, 0)
    # exp(Gam) I of the transition: the trace of its gradient.
    diagonal = dtransitions + row * (K * K)
    flow_total = tl.zeros([], tl.float32)
    for t in range(0, K, TK):
        x = t + tl.arange(0, TK)
        flow_total += tl.sum(tl.load(diagonal + x * (K + 1), mask=x < K, other=0.0).to(tl.float32), 0)
    flow_total *= tl.exp2(total)
    from_start, to_end = tl.exp2(G)[:, None], tl.exp2(total - G)[:, None]
    for t in range(0, K, TK):
        q_CT = load_rows(q_rows, q_t, n, t, C, K, TK).to(DOT)
        k_CT = load_rows(k_rows, k_t, n, t, C, K, TK).to(DOT)
        dq_CT = load_block(dseen + tile, 0, t, C, K, C, TK).to(tl.float32) * (from_start * scale)
        flow += tl.sum(dq_CT * q_CT.to(tl.float32), 1)
        dq_CT = tl.dot(dscores_CC, k_CT, dq_CT, input_precision=PRECISION)
        store_rows(dq + (token * H + h) * K, H * K, n, t, dq_CT, C, K, TK)
        dk_CT = load_block(doutgoing + tile, 0, t, C, K, C, TK).to(tl.float32) * to_end
        given = tl.sum(dk_CT * k_CT.to(tl.float32), 1)
        flow_total += tl.sum(given, 0)
        dread_CT = load_block(dincoming + tile, 0, t, C, K, C, TK).to(tl.float32) * from_start
        flow += tl.sum(dread_CT * k_CT.to(tl.float32), 1) - given
        dk_CT = tl.dot(tl.trans(dscores_CC), q_CT, dk_CT + dread_CT, input_precision=PRECISION)
        dk_CT = tl.dot(dkeys_CC, k_CT, dk_CT, input_precision=PRECISION)
        dk_CT = tl.dot(tl.trans(dkeys_CC), k_CT, dk_CT, input_precision=PRECISION)
        store_rows(dk + (token * H + h) * K, H * K, n, t, dk_CT, C, K, TK)
    # G_i is a sum over the tokens up to i; what crosses the whole chunk flows across all of them.
    dg = tl.cumsum(tl.where(inside, flow, 0.0), 0, reverse=True) + flow_total
    g = tl.load(log_decay + b * g_b + first * g_t + h * g_h + i * g_t, mask=inside, other=0.0).to(tl.float32)
    dg = tl.where(g < MIN_LOG_DECAY, 0.0, dg)
    tl.store(dlog_decay + token * dg_t + h + i * dg_t, dg.to(dlog_decay.dtype.element_ty), mask=inside)
