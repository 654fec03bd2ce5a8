"""The reads between chunks, differentiated on the side of what is read.

dY[slot] = X^T diag(lambda) dO,   dF = X^T dX'           read by one chunk each
dR[column] = sum over the chunks of the run of X'^T diag(lambda) dO
"""

# C chunk, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.delta_rule.tiles import (
    BITS,
    RUN,
    SIZES,
    columns_read,
    count_bits,
    locate,
    locate_entries,
    locate_in_run,
    slots_read,
)
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import head_program, load_rows, store_block
from loglinear.kernels.triton.walks import nearest


@triton.jit
def load_weighted(
    scales, do, l_t, o_t, n, level, L, column,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """diag(lambda) dO of one chunk, one tile of V."""
    DTYPE: tl.constexpr = scales.dtype.element_ty
    weight = prefetched(load_scale(scales, l_t, n, level, L, tl.arange(0, C)), DTYPE)
    do_CV = load_rows(do, o_t, n, column, C, V, BV).to(tl.float32)
    return (do_CV * weight[:, None]).to(MATH.dot)


@triton.jit(do_not_specialize=SIZES)
def state_backward_kernel(
    seen, level_scales, do, dkept, table,
    T, N, H, L, num_slots,
    l_b, l_t, l_h, o_b, o_t, o_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head, one [TK, BV] tile of what it read of its run: dkept [chunk, slot, H, K, V]. Of a chunk
    without tokens it is 0."""
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, chunk = head_program(ROWS * TILES, H)
    c, row, column = chunk.to(tl.int64), tile // TILES * TK, tile % TILES * BV
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.maximum(tl.minimum(end - first, C), 0).to(tl.int32)
    reads = slots_read(z & (RUN - 1), num_slots)
    x_CT = load_rows(seen + (c * H + h) * (C * K), K, n, row, C, K, TK)
    scales, do = level_scales + b * l_b + first * l_t + h * l_h, do + b * o_b + first * o_t + h * o_h
    for _ in range(count_bits(reads)):
        slot = nearest(reads)
        reads &= reads - 1
        do_CV = load_weighted(scales, do, l_t, o_t, n, slot + (LOG_C + 1), L, column, V, C, BV, MATH)
        dstate_TV = tl.dot(tl.trans(x_CT), do_CV, input_precision=MATH.precision)
        store_block(dkept + ((c * num_slots + slot) * H + h) * (K * V), row, column, dstate_TV, K, V, TK, BV)


@triton.jit(do_not_specialize=SIZES)
def prefix_backward_kernel(
    seen, dbrought, dprefixes, table, first_runs,
    T, N, H, columns,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One chunk, one head, one [TK, TK] tile of the gradient of the transition from its run's start: dprefixes [chunk,
    H, K, K], 0 where nothing came through it."""
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile, h, chunk = head_program(TILES * TILES, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.maximum(tl.minimum(end - first, C), 0).to(tl.int32)
    place, start, run = locate_in_run(z, z0, sequence, first_runs, N, PACKED)
    if place <= start:
        return
    row, column = tile // TILES * TK, tile % TILES * TK
    n = tl.where(columns_read(z >> BITS, columns, NODES) > 0, n, 0)
    x_CT = load_rows(seen + (c * H + h) * (C * K), K, n, row, C, K, TK)
    dx_CT = load_rows(dbrought + (c * H + h) * (C * K), K, n, column, C, K, TK)
    dprefix_TT = tl.dot(tl.trans(x_CT), dx_CT, input_precision=MATH.precision)
    store_block(dprefixes + (c * H + h) * (K * K), row, column, dprefix_TT, K, K, TK, TK)


@triton.jit(do_not_specialize=SIZES)
def carried_backward_kernel(
    brought, level_scales, do, dcarried, chunk_table, table,
    T, N, H, L, columns,
    l_b, l_t, l_h, o_b, o_t, o_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One column of what one run was carried, one head, one [TK, BV] tile: dcarried [run, column, H, K, V]."""
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(ROWS * TILES, H)
    place, run = part % columns, part // columns
    base, start, stop, number, sequence, has_end = locate_entries(run, table, N, PACKED)
    if (stop <= start) | ((columns_read(number, columns, NODES) >> place) & 1 == 0):
        return
    row, column = tile // TILES * TK, tile % TILES * BV
    total = tl.zeros([TK, BV], tl.float32)
    for entry in range(start, stop):
        c = base + entry
        b, first, end, z, z0, sequence_ = locate(c, chunk_table, T, N, C, PACKED)
        n = tl.maximum(tl.minimum(end - first, C), 0).to(tl.int32)
        x_CT = load_rows(brought + (c * H + h) * (C * K), K, n, row, C, K, TK)
        do_CV = load_weighted(
            level_scales + b * l_b + first * l_t + h * l_h, do + b * o_b + first * o_t + h * o_h, l_t, o_t, n,
            place + (LOG_C + 1 + BITS), L, column, V, C, BV, MATH,
        )  # fmt: skip
        total = tl.dot(tl.trans(x_CT), do_CV, total, input_precision=MATH.precision)
    out = dcarried + ((run.to(tl.int64) * columns + place) * H + h) * (K * V)
    store_block(out, row, column, total, K, V, TK, BV)
