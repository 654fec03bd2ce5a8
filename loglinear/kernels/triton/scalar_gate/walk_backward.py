"""The reads between chunks, differentiated on the query's side.

    dQ = sum_l diag(lambda_l exp(G) P_path) dO S_l^T + dA K      dlambda_l = rowsum(Q S_l * exp(G) P_path dO)

dA of the chunk itself comes from `in_chunk_backward`. What flows through a read, lambda_l dlambda_l, is the gradient of
the logarithms of the decays on its way.
"""

# C chunk, H heads, G groups, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.levels import column_of, load_read_scales, load_scale, scales_product
from loglinear.kernels.triton.tiles import (
    SIZES,
    arrived,
    as_product,
    group_program,
    identity,
    load_rows,
    load_state,
    nothing,
    rows_again,
    scores_tile,
    store_rows,
)
from loglinear.kernels.triton.walks import READS, load_blocks, nearest, slot_pointer, walk


@triton.jit(do_not_specialize=SIZES)
def walk_backward_kernel(
    q, k, level_scales, cumulative, slots, nodes, log_p, do, dscores, cross_scales,
    dq, dlevel_scales, walk_flow, read_paths, beyond, table,
    T, N, H, R, L, cap, scale, plane, dscores_plane,
    q_b, q_t, q_h, k_b, k_t, k_h, l_b, l_t, l_h, o_b, o_t, o_h, dl_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, HALVES: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One half of a chunk and R / SPLIT heads of one group.

    Writes dq (plane `split`), the columns of dlevel_scales from LOG_C + 1 on (with two halves from LOG_C on; adding to
    the last one where the chunk shares it), walk_flow [chunk, H, C] (what each token reads outside its half), and for
    the readers' adjoint read_paths [chunk, H, READS] and beyond [chunk, half, H, READS]: what flows on to farther
    blocks than each."""
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    TILES: tl.constexpr = (V + BV - 1) // BV
    ROWS: tl.constexpr = C // HALVES
    LOG_ROWS: tl.constexpr = LOG_C if HALVES == 1 else LOG_C - 1
    split, group, head, share, half, n, first, c, b, end, z, z0, sequence = group_program(
        table, T, N, H, R, C, HALVES, SPLIT, PACKED
    )
    if n <= 0:
        return
    token, groups, last = b * T + first, H // R, L - 1
    i, l_R = tl.arange(0, ROWS), tl.arange(0, READS)
    q_CK = load_rows(q + b * q_b + first * q_t + group * q_h, q_t, n, 0, ROWS, K, BK).to(DOT)
    k_rows = k + b * k_b + first * k_t + group * k_h
    one = identity(BV, DOT)
    dq_CK = tl.zeros([ROWS, BK], tl.float32)
    for j in range(half + 1):
        tile_CC = scores_tile(dscores, dscores_plane, split, c, groups, group, half, j, HALVES, ROWS)
        dscores_CC = tl.load(tile_CC + i[:, None] * ROWS + i[None, :])
        k_JK = load_rows(k_rows - (half - j) * ROWS * k_t, k_t, n + (half - j) * ROWS, 0, ROWS, K, BK).to(DOT)
        dq_CK = tl.dot(dscores_CC, k_JK, dq_CK, input_precision=PRECISION)
    read, end_of_blocks, are_nodes = walk(z, z0, cap)
    reads = tl.sum(tl.where(read, 1 << l_R, 0), 0)
    count = tl.sum(read.to(tl.int32), 0)
    row = (c * H + head) * C + half * ROWS
    level_scales += b * l_b + first * l_t
    for h in range(head, head + share):
        i = rows_again(h, 0, ROWS)
        G, log_block = tl.load(cumulative + row + (h - head) * C + i), load_blocks(log_p, c, z, z0, cap, h, H)
        lambdas = load_read_scales(level_scales + h * l_h, l_t, n, reads, L, i, LOG_C)
        to = dlevel_scales + token * dl_t + h * L
        do_h = do + b * o_b + first * o_t + h * o_h
        if TILES == 1:
            do_CV = as_product(load_rows(do_h, o_t, n, 0, ROWS, V, BV, h).to(DOT), one, PRECISION)
        if HALVES > 1:
            n_cross = tl.where(half > 0, n, 0)
            cross = tl.load(cross_scales + (c * H + h) * ROWS + i, mask=i < n_cross, other=0.0)
            cross_scale = load_scale(level_scales + h * l_h, l_t, n_cross, LOG_C, L, i)
        path = tl.cumsum(log_block, 0) - log_block
        weights = tl.exp2(G[:, None] + path[None, :]) * scale
        weights *= scales_product(lambdas, identity(READS, DOT), DTYPE, DOT, PRECISION)
        remaining, pulled = reads, tl.zeros([ROWS, READS], tl.float32)
        for _ in range(count):
            l = nearest(remaining)
            remaining &= remaining - 1
            weight = column_of(weights, l)
            state = slot_pointer(slots, nodes, c, z, z0, sequence, l, cap, h, H, K * V, NODES)
            dscale = tl.zeros([ROWS], tl.float32)
            for tile in (tl.static_range if TILES <= 2 else tl.range)(TILES):
                if TILES > 1:
                    do_CV = as_product(load_rows(do_h, o_t, n, tile * BV, ROWS, V, BV, h).to(DOT), one, PRECISION)
                state_KV = load_state(state, tile * BV, K, V, BK, BV, l)
                dscale += tl.sum(tl.dot(q_CK, state_KV, input_precision=PRECISION) * do_CV, 1)
                weighted_CV = (do_CV * weight[:, None]).to(DOT)
                dq_CK = tl.dot(weighted_CV, tl.trans(state_KV), dq_CK, input_precision=PRECISION)
            pulled += tl.where(l_R[None, :] == l, dscale[:, None], 0.0)
        # The decays once more: kept from before the reads they would take registers all through them.
        flows, dscales = pulled * weights, pulled * tl.exp2((G + nothing(h, 0))[:, None] + path[None, :]) * scale
        flow, in_last = tl.sum(flows, 1), tl.sum(tl.where(l_R[None, :] >= cap, dscales, 0.0), 1)
        if HALVES > 1:
            flow += cross * arrived(cross_scale, DTYPE)
            in_last += tl.where(last <= LOG_C, cross, 0.0)
            tl.store(to + i * dl_t + LOG_C, cross.to(to.dtype.element_ty), mask=i < tl.where(last > LOG_C, n, 0))
        if last <= LOG_ROWS:  # levels of the chunk are in the last column too
            in_last += tl.load(to + i * dl_t + last, mask=i < n, other=0.0).to(tl.float32)
        dscales = tl.where(l_R[None, :] == cap, in_last[:, None], dscales)
        columns = (i * dl_t)[:, None] + tl.minimum(LOG_C + 1 + l_R, last)[None, :]
        tl.store(to + columns, dscales.to(to.dtype.element_ty), mask=(i < n)[:, None] & (l_R <= cap)[None, :])
        tl.store(walk_flow + row + (h - head) * C + i, flow)
        flow_R = tl.sum(flows, 0)
        tl.store(beyond + ((c * HALVES + half) * H + h) * READS + l_R, tl.cumsum(flow_R, 0, reverse=True) - flow_R)
        if half == 0:
            tl.store(read_paths + (c * H + h) * READS + l_R, path)
    store_rows(dq + split * plane + (token * groups + group) * K, groups * K, n, 0, dq_CK, ROWS, K, BK)
