"""The reads between chunks, differentiated on the queries' side.

    at each read O += diag(lambda) X S:    dX += diag(lambda) dO S^T,   dlambda = rowsum(X * dO S^T)
    through X' = X F:                      dX += dX' F^T

A tile of columns of X at a time: first X' and dX' at the start of the run, of which the gradients of what was carried
there and of F are made too, then dX. What each tile gives to dlambda is summed at last.
"""

# C chunk, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import (
    BITS,
    RUN,
    SIZES,
    columns_read,
    count_bits,
    locate_in_run,
    slots_read,
)
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import arrived, head_program, load_block, load_rows, locate, store_block
from loglinear.kernels.triton.walks import nearest


@triton.jit
def pull_state(
    x_CT, dx_CT, scales, l_t, level, L, do_rows, o_t, n, state, row, share,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX + diag(lambda) dO S^T, columns from `row` on; stores their share of dlambda."""
    pulled_CT, i = tl.zeros([C, TK], tl.float32), tl.arange(0, C)
    weight = arrived(load_scale(scales, l_t, n, level, L, i), scales.dtype.element_ty)
    for column in range(0, V, BV):
        do_CV = load_rows(do_rows, o_t, n, column, C, V, BV).to(DOT)
        state_TV = load_block(state, row, column, K, V, TK, BV)
        pulled_CT = tl.dot(do_CV, tl.trans(state_TV), pulled_CT, input_precision=PRECISION)
    tl.store(share + i, tl.sum(pulled_CT * x_CT.to(tl.float32), 1))
    return dx_CT + pulled_CT * weight[:, None]


@triton.jit(do_not_specialize=SIZES)
def carried_walk_backward_kernel(
    level_scales, seen, prefixes, prefix_totals, carried, do, brought, dbrought, shares, table, first_runs,
    T, N, H, L, num_slots, columns,
    l_b, l_t, l_h, o_b, o_t, o_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One chunk, one head, one tile of columns of X' and dX', brought and dbrought [chunk, H, C, K], where something is
    carried; shares [chunk, H, tile, slot or column, C] of dlambda."""
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile, h, chunk = head_program(TILES, H)
    c, to = chunk.to(tl.int64), tile * TK
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    reads = columns_read(z >> BITS, columns, NODES)
    if (n <= 0) | (reads == 0):
        return
    row = c * H + h
    place, start, run = locate_in_run(z, z0, sequence, first_runs, N, PACKED)
    seen += row * (C * K)
    x_CT = load_block(seen, 0, to, C, K, C, TK)
    if place > start:
        total_CT = x_CT.to(tl.float32) * tl.exp2(tl.load(prefix_totals + row))
        for s in range(0, K, TK):
            source_CT = load_block(seen, 0, s, C, K, C, TK)
            prefix_TT = load_block(prefixes + row * (K * K), s, to, K, K, TK, TK)
            total_CT = tl.dot(source_CT, prefix_TT, total_CT, input_precision=PRECISION)
        x_CT = total_CT.to(DOT)
    store_block(brought + row * (C * K), 0, to, x_CT, C, K, C, TK)
    scales, do_rows = level_scales + b * l_b + first * l_t + h * l_h, do + b * o_b + first * o_t + h * o_h
    carried += (run * columns * H + h) * (K * V)
    shares += ((row * TILES + tile) * (num_slots + columns) + num_slots) * C
    dx_CT = tl.zeros([C, TK], tl.float32)
    for _ in range(count_bits(reads)):
        column = nearest(reads)
        reads &= reads - 1
        dx_CT = pull_state(
            x_CT, dx_CT, scales, l_t, column + (LOG_C + 1 + BITS), L, do_rows, o_t, n,
            carried + column.to(tl.int64) * H * (K * V), to, shares + column * C,
            K, V, C, TK, BV, DOT, PRECISION,
        )  # fmt: skip
    store_block(dbrought + row * (C * K), 0, to, dx_CT, C, K, C, TK)


@triton.jit(do_not_specialize=SIZES)
def walk_backward_kernel(
    level_scales, seen, kept, prefixes, prefix_totals, do, dbrought, dseen, shares, table, first_runs,
    T, N, H, L, num_slots, columns,
    l_b, l_t, l_h, o_b, o_t, o_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One chunk, one head, one tile of columns of dX, dseen [chunk, H, C, K]; and its shares of dlambda."""
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile, h, chunk = head_program(TILES, H)
    c, to = chunk.to(tl.int64), tile * TK
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    row = c * H + h
    place, start, run = locate_in_run(z, z0, sequence, first_runs, N, PACKED)
    dbrought += row * (C * K)
    dx_CT = tl.zeros([C, TK], tl.float32)
    if columns_read(z >> BITS, columns, NODES) > 0:
        dx_CT += load_block(dbrought, 0, to, C, K, C, TK).to(tl.float32)
        if place > start:
            dx_CT *= tl.exp2(tl.load(prefix_totals + row))
            for s in range(0, K, TK):
                source_CT = load_block(dbrought, 0, s, C, K, C, TK)
                prefix_TT = load_block(prefixes + row * (K * K), to, s, K, K, TK, TK)
                dx_CT = tl.dot(source_CT, tl.trans(prefix_TT), dx_CT, input_precision=PRECISION)
    scales, do_rows = level_scales + b * l_b + first * l_t + h * l_h, do + b * o_b + first * o_t + h * o_h
    kept += (c * num_slots * H + h) * (K * V)
    shares += (row * TILES + tile) * (num_slots + columns) * C
    x_CT = load_block(seen + row * (C * K), 0, to, C, K, C, TK)
    reads = slots_read(place, num_slots)
    for _ in range(count_bits(reads)):
        slot = nearest(reads)
        reads &= reads - 1
        dx_CT = pull_state(
            x_CT, dx_CT, scales, l_t, slot + (LOG_C + 1), L, do_rows, o_t, n,
            kept + slot.to(tl.int64) * H * (K * V), to, shares + slot * C,
            K, V, C, TK, BV, DOT, PRECISION,
        )  # fmt: skip
    store_block(dseen + row * (C * K), 0, to, dx_CT, C, K, C, TK)


@triton.jit(do_not_specialize=SIZES)
def scales_backward_kernel(
    shares, dlevel_scales, table,
    T, N, H, L, num_slots, columns, dl_t,
    C: tl.constexpr, LOG_C: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One chunk, one head: the columns of dlevel_scales that the walk reads, others it leaves. What it gives to a last
    column that the chunk shares is there for `scores_backward` to add to."""
    _, h, chunk = head_program(1, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    i, last, count = tl.arange(0, C), L - 1, num_slots + columns
    inside = i < end - first
    to = dlevel_scales + (b * T + first) * dl_t + h * L + i * dl_t
    shared = tl.zeros([C], tl.float32)  # of the last column
    own = slots_read(z & (RUN - 1), num_slots)
    reads = own | columns_read(z >> BITS, columns, NODES) << num_slots
    for _ in range(count_bits(reads)):
        place = nearest(reads)
        reads &= reads - 1
        at = tl.minimum(tl.where(place < num_slots, place, place - num_slots + BITS) + (LOG_C + 1), last)
        total = tl.zeros([C], tl.float32)
        for tile in tl.static_range(TILES):
            share = shares + (((c * H + h) * TILES + tile) * count + place) * C
            total += tl.load(share + i, mask=inside, other=0.0)
        tl.store(to + at, total.to(dlevel_scales.dtype.element_ty), mask=inside & (at < last))
        shared += tl.where(at < last, 0.0, total)
    tl.store(to + last, shared.to(dlevel_scales.dtype.element_ty), mask=inside)
