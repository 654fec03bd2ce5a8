"""The reads between chunks, differentiated on the query's side.

    dQ = sum_l diag(lambda_l exp(G) P_path) dO S_l^T          dlambda_l = rowsum(Q * exp(G) P_path dO S_l^T)

and what flows through every read: rowsum(...) lambda_l, the gradient of the logarithms of the decays on its way.
"""

# C chunk, H heads, G groups, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.tiles import (
    READS,
    SIZES,
    column_of,
    exponent,
    group_program,
    load_read_scales,
    load_rows,
    load_state,
    paths,
    slot_pointer,
    store_rows,
)


@triton.jit(do_not_specialize=SIZES)
def walk_backward_kernel(
    q, level_scales, cumulative, slots, nodes, log_p, do, dq, dlevel_scales, row_flow, read_paths, beyond, table,
    T, N, H, R, L, cap, scale, plane,
    q_b, q_t, q_h, l_b, l_t, l_h, o_b, o_t, o_h, dl_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One chunk and R / SPLIT heads of one group. Writes dq (plane `split`, float32), dlevel_scales (the columns of
    blocks), row_flow [chunk, H, C], and for the readers' adjoint read_paths and beyond [chunk, H, READS]: what flows
    on to farther blocks than each."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    split, group, head, share, c, b, first, end, z, z0, sequence = group_program(table, T, N, H, R, C, SPLIT, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    token, groups = b * T + first, H // R
    i, l_R = tl.arange(0, C), tl.arange(0, READS)
    q_CK = load_rows(q + b * q_b + first * q_t + group * q_h, q_t, n, 0, C, K, BK).to(DOT)
    dq_CK = tl.zeros([C, BK], tl.float32)
    for h in range(head, head + share):
        G = tl.load(cumulative + (c * H + h) * C + i)
        read, path = paths(log_p, c, z, z0, cap, h, H)
        scales = load_read_scales(level_scales + b * l_b + first * l_t + h * l_h, l_t, n, read, L, scale, C, LOG_C)
        from_start = tl.exp2(G)
        dscales = tl.zeros([C, READS], tl.float32)
        do_h = do + b * o_b + first * o_t + h * o_h
        if TILES == 1:
            do_CV = load_rows(do_h, o_t, n, 0, C, V, BV).to(DOT)
        remaining = tl.sum(tl.where(read, 1 << l_R, 0), 0)
        for _ in range(tl.sum(read.to(tl.int32), 0)):
            l = exponent(remaining & -remaining)
            remaining &= remaining - 1
            state = slot_pointer(slots, nodes, c, z, z0, sequence, l, cap, h, H, K * V, NODES)
            decay = from_start * tl.exp2(tl.sum(tl.where(l_R == l, path, 0.0), 0))
            weight = decay * column_of(scales, l)
            dscale = tl.zeros([C], tl.float32)
            for tile in range(TILES):
                if TILES > 1:
                    do_CV = load_rows(do_h, o_t, n, tile * BV, C, V, BV).to(DOT)
                state_KV = load_state(state, tile * BV, K, V, BK, BV)
                do_float = do_CV.to(tl.float32)
                dscale += tl.sum(tl.dot(q_CK, state_KV, input_precision=PRECISION) * do_float, 1)
                weighted_CV = (do_float * weight[:, None]).to(DOT)
                dq_CK = tl.dot(weighted_CV, tl.trans(state_KV), dq_CK, input_precision=PRECISION)
            dscales += tl.where(l_R[None, :] == l, (dscale * decay)[:, None], 0.0)
        flow = dscales * scales
        tl.store(row_flow + (c * H + h) * C + i, tl.sum(flow, 1))
        tl.store(read_paths + (c * H + h) * READS + l_R, path)
        flow_R = tl.sum(flow, 0)
        tl.store(beyond + (c * H + h) * READS + l_R, tl.cumsum(flow_R, 0, reverse=True) - flow_R)
        # Candidates from the cap on share the last column.
        past = tl.sum(tl.where(l_R[None, :] >= cap, dscales, 0.0), 1)
        dscales = tl.where(l_R[None, :] == cap, past[:, None], dscales)
        columns = tl.minimum(LOG_C + 1 + l_R, L - 1)[None, :]
        to = dlevel_scales + token * dl_t + h * L + (i * dl_t)[:, None] + columns
        tl.store(
            to, (dscales * scale).to(dlevel_scales.dtype.element_ty), mask=(i < n)[:, None] & (l_R <= cap)[None, :]
        )
    store_rows(dq + split * plane + (token * groups + group) * K, groups * K, n, 0, dq_CK, C, K, BK)
