"""Everything that stays inside a chunk, differentiated.

    S = Q K^T * dec,   E = S Ab,   U = Ab V,   Er = -Ab diag(exp(G)) K,   Kd = diag(exp(Gam - G)) K
    O = (E * LAM) V,   X = diag(exp(G)) Q + S Er,   S_z = Kd^T U,   P_z = exp(Gam) I + Kd^T Er

Three stages, one matrix product after the other, so that few tiles live at a time. What needs all of V:

    dU = Kd dS_z,   dV = (E * LAM)^T dO + Ab^T dU,   dKd = U dS_z^T
    dE = (dO V^T) * LAM,   dlambda = sums of (dO V^T) * E

what needs the transition's gradient,

    dS = dE Ab^T + dX Er^T,   dQ = (dS * dec) K + diag(exp(G)) dX
    dEr = Kd dP_z + S^T dX,   d(diag(exp(G)) K) = -Ab^T dEr,   dKd += Er dP_z^T
    dAb = dU V^T - dEr K^T diag(exp(G)) + S^T dE

and the keys: Ab = A diag(b), A = (I + N)^-1 gives dN = -tril(A^T dA A^T, -1).
"""

# C chunk, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import chunk_scales, decay, key_products, load_decays, load_strength
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
def values_backward_kernel(
    k, v, beta, level_scales, inverse, cumulative, effective, written, dslots, do,
    dv, dwritten, deffective, doutgoing, dlevel_scales, table,
    T, N, H, R, L,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, l_b, l_t, l_h, o_b, o_t, o_h, dv_t, dl_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    LINEAR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head: dv, dwritten [chunk, H, C, V], deffective [chunk, H, C, C], doutgoing [chunk, H, C, K], and
    the columns of dlevel_scales up to LOG_C, adding to the last one where the walk shares it."""
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    _, h, chunk = head_program(1, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    i, row, last = tl.arange(0, C), c * H + h, L - 1
    tile_CC, tile_CK, tile_CV, tile_KV = row * (C * C), row * (C * K), row * (C * V), row * (K * V)
    k_rows = k + b * k_b + first * k_t + (h // R) * k_h
    v_rows, do_rows = v + b * v_b + first * v_t + h * v_h, do + b * o_b + first * o_t + h * o_h
    scales = level_scales + b * l_b + first * l_t + h * l_h

    scales_CC = chunk_scales(scales, l_t, n, L, i, DTYPE, C, LINEAR, DOT, PRECISION)
    pulled_CC = tl.zeros([C, C], tl.float32)
    for column in range(0, V, BV):
        do_CV = load_rows(do_rows, o_t, n, column, C, V, BV).to(DOT)
        v_CV = load_rows(v_rows, v_t, n, column, C, V, BV).to(DOT)
        pulled_CC = tl.dot(do_CV, tl.trans(v_CV), pulled_CC, input_precision=PRECISION)
    store_block(deffective + tile_CC, 0, 0, pulled_CC * scales_CC, C, C, C, C)
    effective_CC = load_block(effective + tile_CC, 0, 0, C, C, C, C).to(tl.float32)
    weights_CC = tl.trans((effective_CC * scales_CC).to(DOT))
    pulled_CC = tl.where(i[:, None] >= i[None, :], pulled_CC * effective_CC, 0.0)
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

    G, total = load_decays(cumulative + row * C, C)
    to_end = tl.exp2(total - G)[:, None]
    strength = load_strength(beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n, C)[:, None]
    for column in range(0, V, BV):
        dwritten_CV = tl.zeros([C, BV], tl.float32)
        for t in range(0, K, TK):
            k_CT = load_rows(k_rows, k_t, n, t, C, K, TK).to(DOT)
            dstate_TV = load_block(dslots + tile_KV, t, column, K, V, TK, BV)
            dwritten_CV = tl.dot(k_CT, dstate_TV, dwritten_CV, input_precision=PRECISION)
        dwritten_CV = (dwritten_CV * to_end).to(DOT)
        store_block(dwritten + tile_CV, 0, column, dwritten_CV, C, V, C, BV)
        inverse_CC = tl.trans(load_block(inverse + tile_CC, 0, 0, C, C, C, C))
        dv_CV = tl.dot(inverse_CC, dwritten_CV, input_precision=PRECISION) * strength
        do_CV = load_rows(do_rows, o_t, n, column, C, V, BV).to(DOT)
        dv_CV = tl.dot(weights_CC, do_CV, dv_CV, input_precision=PRECISION)
        store_rows(dv + (b * T + first) * dv_t + h * V, dv_t, n, column, dv_CV, C, V, BV)
    for t in range(0, K, TK):
        doutgoing_CT = tl.zeros([C, TK], tl.float32)
        for column in range(0, V, BV):
            written_CV = load_block(written + tile_CV, 0, column, C, V, C, BV)
            dstate_TV = load_block(dslots + tile_KV, t, column, K, V, TK, BV)
            doutgoing_CT = tl.dot(written_CV, tl.trans(dstate_TV), doutgoing_CT, input_precision=PRECISION)
        store_block(doutgoing + tile_CK, 0, t, doutgoing_CT, C, K, C, TK)


@triton.jit(do_not_specialize=SIZES)
def scores_backward_kernel(
    q, k, v, beta, inverse, cumulative, scores, erased, dtransitions, dseen, dwritten, deffective,
    dq, flow, dscores, dwrite, derased, dincoming, doutgoing, table,
    T, N, H, R, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, dq_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head: dq [B, T, H, K], the decays' share of it, flow [chunk, H, C], dscores and dwrite [chunk, H,
    C, C], dincoming [chunk, H, C, K]; adds to doutgoing; derased [chunk, H, C, K] on the way."""
    _, h, chunk = head_program(1, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    i, row, token = tl.arange(0, C), c * H + h, b * T + first
    tile_CC, tile_CK, tile_KK = row * (C * C), row * (C * K), row * (K * K)
    q_rows, k_rows = q + b * q_b + first * q_t + (h // R) * q_h, k + b * k_b + first * k_t + (h // R) * k_h
    v_rows = v + b * v_b + first * v_t + h * v_h
    G, total = load_decays(cumulative + row * C, C)
    to_end = tl.exp2(total - G)[:, None]
    strength = load_strength(beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n, C)
    weighted_CC = load_block(deffective + tile_CC, 0, 0, C, C, C, C).to(tl.float32) * strength[None, :]
    inverse_CC = tl.trans(load_block(inverse + tile_CC, 0, 0, C, C, C, C))
    dscores_CC = tl.dot(weighted_CC.to(DOT), inverse_CC, input_precision=PRECISION)
    for t in range(0, K, TK):
        dx_CT = load_block(dseen + tile_CK, 0, t, C, K, C, TK)
        erased_CT = load_block(erased + tile_CK, 0, t, C, K, C, TK)
        dscores_CC = tl.dot(dx_CT, tl.trans(erased_CT), dscores_CC, input_precision=PRECISION)
    flow_CC = dscores_CC * load_block(scores + tile_CC, 0, 0, C, C, C, C).to(tl.float32)
    flows = tl.sum(flow_CC, 1) - tl.sum(flow_CC, 0)
    dscores_CC = (dscores_CC * (decay(G, G, i, C) * scale)).to(DOT)
    store_block(dscores + tile_CC, 0, 0, dscores_CC, C, C, C, C)
    for t in range(0, K, TK):
        k_CT = load_rows(k_rows, k_t, n, t, C, K, TK).to(DOT)
        dq_CT = load_block(dseen + tile_CK, 0, t, C, K, C, TK).to(tl.float32) * (tl.exp2(G) * scale)[:, None]
        flows += tl.sum(dq_CT * load_rows(q_rows, q_t, n, t, C, K, TK).to(tl.float32), 1)
        dq_CT = tl.dot(dscores_CC, k_CT, dq_CT, input_precision=PRECISION)
        store_rows(dq + token * dq_t + h * K, dq_t, n, t, dq_CT, C, K, TK)
    tl.store(flow + row * C + i, flows)
    tl.debug_barrier()
    scores_CC = tl.trans(load_block(scores + tile_CC, 0, 0, C, C, C, C))
    for t in range(0, K, TK):
        derased_CT = tl.zeros([C, TK], tl.float32)
        for s in range(0, K, TK):
            k_CT = load_rows(k_rows, k_t, n, s, C, K, TK).to(DOT)
            block_TT = load_block(dtransitions + tile_KK, s, t, K, K, TK, TK)
            derased_CT = tl.dot(k_CT, block_TT, derased_CT, input_precision=PRECISION)
        dx_CT = load_block(dseen + tile_CK, 0, t, C, K, C, TK)
        derased_CT = tl.dot(scores_CC, dx_CT, derased_CT * to_end, input_precision=PRECISION).to(DOT)
        store_block(derased + tile_CK, 0, t, derased_CT, C, K, C, TK)
        dincoming_CT = tl.dot(inverse_CC, derased_CT, input_precision=PRECISION) * -strength[:, None]
        store_block(dincoming + tile_CK, 0, t, dincoming_CT, C, K, C, TK)
    tl.debug_barrier()
    dwrite_CC = tl.zeros([C, C], tl.float32)
    for t in range(0, K, TK):
        k_CT = load_rows(k_rows, k_t, n, t, C, K, TK).to(DOT)
        derased_CT = load_block(derased + tile_CK, 0, t, C, K, C, TK)
        dwrite_CC = tl.dot(derased_CT, tl.trans(k_CT), dwrite_CC, input_precision=PRECISION)
    dwrite_CC *= -tl.exp2(G)[None, :]
    for column in range(0, V, BV):
        v_CV = load_rows(v_rows, v_t, n, column, C, V, BV).to(DOT)
        dwritten_CV = load_block(dwritten + row * (C * V), 0, column, C, V, C, BV)
        dwrite_CC = tl.dot(dwritten_CV, tl.trans(v_CV), dwrite_CC, input_precision=PRECISION)
    deffective_CC = load_block(deffective + tile_CC, 0, 0, C, C, C, C)
    dwrite_CC = tl.dot(scores_CC, deffective_CC, dwrite_CC, input_precision=PRECISION)
    store_block(dwrite + tile_CC, 0, 0, dwrite_CC, C, C, C, C)
    for t in range(0, K, TK):
        doutgoing_CT = load_block(doutgoing + tile_CK, 0, t, C, K, C, TK).to(tl.float32)
        for s in range(0, K, TK):
            erased_CT = load_block(erased + tile_CK, 0, s, C, K, C, TK)
            block_TT = load_block(dtransitions + tile_KK, t, s, K, K, TK, TK)
            doutgoing_CT = tl.dot(erased_CT, tl.trans(block_TT), doutgoing_CT, input_precision=PRECISION)
        store_block(doutgoing + tile_CK, 0, t, doutgoing_CT, C, K, C, TK)


@triton.jit(do_not_specialize=SIZES)
def keys_backward_kernel(
    q, k, beta, log_decay, inverse, cumulative, dtransitions, flow, dscores, dwrite, dincoming, doutgoing,
    dk, dbeta, dlog_decay, table,
    T, N, H, R,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, dk_t, db_t, dg_t,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head: dk [B, T, H, K], dbeta, dlog_decay."""
    _, h, chunk = head_program(1, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    i, row = tl.arange(0, C), c * H + h
    inside, tile_CK, tile_CC, token = i < n, row * (C * K), row * (C * C), b * T + first
    q_rows, k_rows = q + b * q_b + first * q_t + (h // R) * q_h, k + b * k_b + first * k_t + (h // R) * k_h
    G, total = load_decays(cumulative + row * C, C)
    strength = load_strength(beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n, C)
    inverse_CC = load_block(inverse + tile_CC, 0, 0, C, C, C, C)
    dwrite_CC = load_block(dwrite + tile_CC, 0, 0, C, C, C, C)
    dstrength = tl.sum(dwrite_CC * inverse_CC.to(tl.float32), 0)
    dwrite_CC = (dwrite_CC * strength[None, :]).to(DOT)
    half_CC = tl.dot(tl.trans(inverse_CC), dwrite_CC, input_precision=PRECISION).to(DOT)
    dlower_CC = -tl.dot(half_CC, tl.trans(inverse_CC), input_precision=PRECISION)
    dlower_CC *= tl.where(i[:, None] > i[None, :], decay(G, G, i, C), 0.0)
    keys_CC = dlower_CC * key_products(k_rows, k_t, n, k_rows, n, K, C, TK, DOT, PRECISION)
    dstrength += tl.sum(keys_CC, 1)
    tl.store(dbeta + token * db_t + h + i * db_t, dstrength.to(dbeta.dtype.element_ty), mask=inside)
    keys_CC *= strength[:, None]
    flows = tl.load(flow + row * C + i) + tl.sum(keys_CC, 1) - tl.sum(keys_CC, 0)
    dkeys_CC = (dlower_CC * strength[:, None]).to(DOT)
    tl.debug_barrier()
    dscores_CC = tl.trans(load_block(dscores + tile_CC, 0, 0, C, C, C, C))
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
        dk_CT = load_block(doutgoing + tile_CK, 0, t, C, K, C, TK).to(tl.float32) * to_end
        given = tl.sum(dk_CT * k_CT.to(tl.float32), 1)
        flow_total += tl.sum(given, 0)
        dread_CT = load_block(dincoming + tile_CK, 0, t, C, K, C, TK).to(tl.float32) * from_start
        flows += tl.sum(dread_CT * k_CT.to(tl.float32), 1) - given
        dk_CT = tl.dot(dscores_CC, q_CT, dk_CT + dread_CT, input_precision=PRECISION)
        dk_CT = tl.dot(dkeys_CC, k_CT, dk_CT, input_precision=PRECISION)
        dk_CT = tl.dot(tl.trans(dkeys_CC), k_CT, dk_CT, input_precision=PRECISION)
        store_rows(dk + token * dk_t + h * K, dk_t, n, t, dk_CT, C, K, TK)
    # G_i is a sum over the tokens up to i; what crosses the whole chunk flows across all of them.
    dg = tl.cumsum(tl.where(inside, flows, 0.0), 0, reverse=True) + flow_total
    g = tl.load(log_decay + b * g_b + first * g_t + h * g_h + i * g_t, mask=inside, other=0.0).to(tl.float32)
    dg = tl.where(g < MIN_LOG_DECAY, 0.0, dg)
    tl.store(dlog_decay + token * dg_t + h + i * dg_t, dg.to(dlog_decay.dtype.element_ty), mask=inside)
