"""The reads between chunks, differentiated on the query's side.

    dQ = sum_l diag(lambda_l exp(G) P_path) dO S_l^T + dA K      dlambda_l = rowsum(Q S_l * exp(G) P_path dO)

dA of the chunk itself comes from `in_chunk_backward`. lambda_l dlambda_l of a read is the gradient of the logarithms of
the decays on its way.
"""

# C chunk, H heads, G groups, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.args import SIZES, Planes, Rows, Sizes, Slab
from loglinear.kernels.triton.compiler import fresh_arange, identity, opaque_zero, prefetched, to_mma_layout
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.levels import column_of, load_read_scales, load_scale, scales_product
from loglinear.kernels.triton.scalar_gate.states import Inputs, Inside, Reads, States
from loglinear.kernels.triton.tiles import (
    load_rows,
    load_state,
    part_of_program,
    rows_at,
    scores_at,
    slab_at,
    store_rows,
)
from loglinear.kernels.triton.walks import (
    after,
    candidate_at,
    load_log_decays,
    path_of,
    slot_pointer,
    start_of_walk,
    walk,
)


@launcher
@triton.jit(do_not_specialize=SIZES)
def walk_backward_kernel(
    q,
    k,
    level_scales,
    states,
    do,
    inside,
    dq,
    dlevel_scales,
    reads,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    HALVES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SPLIT: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One half of a chunk and R / SPLIT heads of one group.

    Writes dq (one plane), `reads`, and the columns of dlevel_scales between chunks, with two halves also the one
    between these; adding to columns that the chunk's own reads share."""
    sizes = Sizes(T, N, H, R, L, cap)
    DTYPE: tl.constexpr = level_scales.data.dtype.element_ty
    TILES: tl.constexpr = (V + BV - 1) // BV
    ROWS: tl.constexpr = C // HALVES
    # The columns of a half, and the one between the halves.
    COLUMNS: tl.constexpr = TREE.column - HALVES + 1 if TREE.column > 1 else 1
    CROSS: tl.constexpr = TREE.column - 1
    READS: tl.constexpr = TREE.reads
    BINARY: tl.constexpr = TREE.radix_log == 1
    part = part_of_program(table, sizes, C, HALVES, SPLIT)
    chunk, half, head = part.chunk, part.half, part.head
    n = chunk.n
    if n <= 0:
        return
    groups, last = H // sizes.R, L - 1
    i, l_R = tl.arange(0, ROWS), tl.arange(0, READS)
    q_CK = load_rows(rows_at(q, chunk, part.group), q.t, n, 0, ROWS, K, BK).to(MATH.dot)
    k_rows = rows_at(k, chunk, part.group)
    one = identity(BV, MATH)
    dq_CK = tl.zeros([ROWS, BK], tl.float32)
    for j in range(half + 1):
        tile_CC = scores_at(inside.dscores, part, groups, half, j, HALVES, ROWS)
        dscores_CC = tl.load(tile_CC + i[:, None] * ROWS + i[None, :])
        k_JK = load_rows(k_rows - (half - j) * ROWS * k.t, k.t, n + (half - j) * ROWS, 0, ROWS, K, BK).to(MATH.dot)
        dq_CK = tl.dot(dscores_CC, k_JK, dq_CK, input_precision=MATH.precision)
    read, end_of_blocks, are_initial = walk(chunk, sizes.cap, TREE)
    start = start_of_walk(read, chunk, TREE)
    count = tl.sum(read.to(tl.int32), 0)
    row = (chunk.c * H + head) * C + half * ROWS
    for h in range(head, head + part.heads):
        i = fresh_arange(h, 0, ROWS)
        G = tl.load(states.cumulative + row + (h - head) * C + i)
        log_block = load_log_decays(states.log_decay, chunk, sizes, h, TREE)
        scales, l_t = rows_at(level_scales, chunk, h), level_scales.t
        to, to_t, do_rows = slab_at(dlevel_scales, chunk, sizes, h, L), dlevel_scales.t, rows_at(do, chunk, h)
        if TILES == 1:
            do_CV = to_mma_layout(load_rows(do_rows, do.t, n, 0, ROWS, V, BV, h).to(MATH.dot), one, MATH)
        if HALVES > 1:
            n_cross = tl.where(half > 0, n, 0)
            cross = tl.load(inside.dcross_scales + (chunk.c * H + h) * ROWS + i, mask=i < n_cross, other=0.0)
            cross_scale = load_scale(scales, l_t, n_cross, CROSS, L, i)
        path, stand = tl.cumsum(log_block, 0) - log_block, start
        if BINARY:  # all reads' numbers in one tile
            lambdas = load_read_scales(scales, l_t, n, start, L, i, TREE)
            weights = tl.exp2(G[:, None] + path[None, :]) * scale
            weights *= scales_product(lambdas, identity(READS, MATH), DTYPE, MATH)
            pulled = tl.zeros([ROWS, READS], tl.float32)
        else:  # there are too many: each read's as it comes, lambda loaded one read ahead
            ahead = load_scale(scales, l_t, n, TREE.column + candidate_at(stand, chunk, TREE), L, i)
            dlog_walk, in_last, dlog_R = (
                tl.zeros([ROWS], tl.float32),
                tl.zeros([ROWS], tl.float32),
                tl.zeros([READS], tl.float32),
            )
        for _ in range(count):
            l = candidate_at(stand, chunk, TREE)
            stand = after(stand, TREE)
            if BINARY:
                weight = column_of(weights, l, READS)
            else:
                decay = tl.exp2(G + path_of(l, log_block, TREE)) * scale
                weight = prefetched(ahead, DTYPE) * decay
                ahead = load_scale(scales, l_t, n, TREE.column + candidate_at(stand, chunk, TREE), L, i)
            state = slot_pointer(states, chunk, l, sizes, h, K * V, TREE)
            dscale = tl.zeros([ROWS], tl.float32)
            for tile in (tl.static_range if TILES <= 2 else tl.range)(TILES):
                if TILES > 1:
                    do_CV = load_rows(do_rows, do.t, n, tile * BV, ROWS, V, BV, h).to(MATH.dot)
                    do_CV = to_mma_layout(do_CV, one, MATH)
                state_KV = load_state(state, tile * BV, K, V, BK, BV, l)
                dscale += tl.sum(tl.dot(q_CK, state_KV, input_precision=MATH.precision) * do_CV, 1)
                weighted_CV = (do_CV * weight[:, None]).to(MATH.dot)
                dq_CK = tl.dot(weighted_CV, tl.trans(state_KV), dq_CK, input_precision=MATH.precision)
            if BINARY:
                pulled += tl.where(l_R[None, :] == l, dscale[:, None], 0.0)
            else:
                dlog_walk += dscale * weight
                dlog_R += tl.where(l_R == l, tl.sum(dscale * weight, 0), 0.0)
                dscale *= decay
                in_last += tl.where(l < sizes.cap, 0.0, dscale)
                to_column = to + i * to_t + TREE.column + l
                tl.store(to_column, dscale.to(to.dtype.element_ty), mask=i < tl.where(l < sizes.cap, n, 0))
        if BINARY:
            # The decays once more: kept from before the reads they would take registers all through them.
            dlog_reads = pulled * weights
            dscales = pulled * tl.exp2((G + opaque_zero(h, 0))[:, None] + path[None, :]) * scale
            dlog_walk, in_last = tl.sum(dlog_reads, 1), tl.sum(tl.where(l_R[None, :] >= sizes.cap, dscales, 0.0), 1)
        if HALVES > 1:
            dlog_walk += cross * prefetched(cross_scale, DTYPE)
            in_last += tl.where(last <= CROSS, cross, 0.0)
            is_apart = i < tl.where(last > CROSS, n, 0)
            if CROSS < COLUMNS:  # the halves' own reads have the same column
                cross += tl.load(to + i * to_t + CROSS, mask=is_apart, other=0.0).to(tl.float32)
            tl.store(to + i * to_t + CROSS, cross.to(to.dtype.element_ty), mask=is_apart)
        if last < COLUMNS:  # columns of the chunk are in the last one too
            in_last += tl.load(to + i * to_t + last, mask=i < n, other=0.0).to(tl.float32)
        if BINARY:
            dscales = tl.where(l_R[None, :] == sizes.cap, in_last[:, None], dscales)
            columns = (i * to_t)[:, None] + tl.minimum(TREE.column + l_R, last)[None, :]
            tl.store(to + columns, dscales.to(to.dtype.element_ty), mask=(i < n)[:, None] & (l_R <= sizes.cap)[None, :])
        else:
            tl.store(to + i * to_t + last, in_last.to(to.dtype.element_ty), mask=i < n)
        tl.store(reads.dlog_walk + row + (h - head) * C + i, dlog_walk)
        if BINARY:
            dlog_R = tl.sum(dlog_reads, 0)
        beyond = reads.beyond + ((chunk.c * HALVES + half) * H + h) * READS
        tl.store(beyond + l_R, tl.cumsum(dlog_R, 0, reverse=True) - dlog_R)
        if half == 0:
            tl.store(reads.paths + (chunk.c * H + h) * READS + l_R, path)
    rows = dq.data + part.split * dq.plane + ((chunk.b * sizes.T + chunk.first) * groups + part.group) * K
    store_rows(rows, groups * K, n, 0, dq_CK, ROWS, K, BK)


def walk_backward(
    x: Inputs, states: States, do: Rows, inside: Inside, dq: Planes, dlevel_scales: Slab, launch: Launch
) -> Reads:
    """Write dq, and dlambda of the levels between chunks; return the rest."""
    chunks, H, halves = x.layout.chunks, x.heads, x.halves
    reads = Reads(
        dlog_walk=x.empty(chunks, H, x.chunk_size),
        paths=x.empty(chunks, H, x.tree.reads),
        beyond=x.empty(chunks, halves, H, x.tree.reads),
    )
    walk_backward_kernel[(chunks * halves * x.groups * x.splits,)](
        x.q,
        x.k,
        x.level_scales,
        states,
        do,
        inside,
        dq,
        dlevel_scales,
        reads,
        x.layout.table,
        *x.sizes,
        x.scale,
        TREE=x.tree,
        HALVES=halves,
        SPLIT=x.splits,
        **x.constants(launch),
    )
    return reads
