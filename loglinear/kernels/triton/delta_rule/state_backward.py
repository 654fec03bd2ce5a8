"""The reads between chunks, differentiated on the side of what is read.

    dS_block = sum over its readers of X^T diag(lambda) dO        dP_block = sum over its readers of X^T dX'

The readers of a block inside a run are the chunks of its right sibling; those of a carried state are all chunks of the
run. X and dX' were kept by `walk_backward`.
"""

# C chunk, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import BITS, RUN, columns_of, node_row, reads_of
from loglinear.kernels.triton.delta_rule.walk_backward import MET
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import (
    SIZES,
    arrived,
    head_program,
    load_block,
    load_rows,
    locate,
    locate_run,
    store_block,
)
from loglinear.kernels.triton.walks import reader_level


@triton.jit
def gather(
    met, dmet, scales, do, c, readers, first, end, place, level, row, column, h, H, L, l_t, o_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    TRANSITION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One [TK, BV] tile of the sum over `readers` chunks from c on, whose tokens begin at `first`; of their kept tiles
    number `place`, read with lambda of `level`."""
    DTYPE: tl.constexpr = scales.dtype.element_ty
    total = tl.zeros([TK, BV], tl.float32)
    readers = tl.minimum(readers, ((end - first + C - 1) // C).to(tl.int32))
    i = tl.arange(0, C)
    for _ in range(readers):
        n = tl.minimum(end - first, C).to(tl.int32)
        tile = ((c * H + h) * MET + place) * (C * K)
        x_CT = load_block(met + tile, 0, row, C, K, C, TK)
        if TRANSITION:
            y_CV = load_block(dmet + tile, 0, column, C, K, C, BV)
        else:
            weight = arrived(load_scale(scales + first * l_t, l_t, n, level, L, i), DTYPE)
            do_CV = load_rows(do + first * o_t, o_t, n, column, C, V, BV).to(tl.float32)
            y_CV = (do_CV * weight[:, None]).to(DOT)
        total = tl.dot(tl.trans(x_CT), y_CV, total, input_precision=PRECISION)
        c += 1
        first += C
    return total


@triton.jit(do_not_specialize=SIZES)
def state_backward_kernel(
    met, dmet, level_scales, do, dslots, table,
    T, N, H, L, cap,
    l_b, l_t, l_h, o_b, o_t, o_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    TRANSITION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The slot of one chunk that is not the last of its run, one head, one [TK, BV] tile of [K, V]; TRANSITION: of its
    transition, V is K then."""
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, chunk = head_program(ROWS * TILES, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    l = reader_level(z, cap, BITS)
    if (end <= first) | ((z + 1) % RUN == 0):
        return
    scales = level_scales + b * l_b + h * l_h
    total = gather(
        met, dmet, scales, do + b * o_b + h * o_h, c + 1, 1 << l, first + C, end, l, LOG_C + 1 + l,
        tile // TILES * TK, tile % TILES * BV, h, H, L, l_t, o_t, K, V, C, TK, BV, TRANSITION, DOT, PRECISION,
    )  # fmt: skip
    store_block(dslots + (c * H + h) * (K * V), tile // TILES * TK, tile % TILES * BV, total, K, V, TK, BV)


@triton.jit(do_not_specialize=SIZES)
def carried_backward_kernel(
    met, dmet, level_scales, do, dcarried, table, runs,
    T, N, H, L, cap, columns,
    l_b, l_t, l_h, o_b, o_t, o_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One column of what one run was given, one head, one [TK, BV] tile: dcarried [run, column, H, K, V]."""
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(ROWS * TILES, H)
    column, run = part % columns, part // columns
    origin, count, number, z0, sequence = locate_run(run, runs, N, 0, PACKED, BITS)
    if number * RUN >= count:
        return
    if (columns_of(reads_of(number * RUN, z0, cap), cap, BITS) >> column) & 1 == 0:
        return
    z_first = tl.maximum(number * RUN, z0)
    c = origin + z_first
    b, first, end, z, z0_, sequence_ = locate(c, table, T, N, C, PACKED)
    total = gather(
        met, dmet, level_scales + b * l_b + h * l_h, do + b * o_b + h * o_h,
        c, number * RUN + RUN - z_first, first, end, BITS, column + (LOG_C + 1 + BITS),
        tile // TILES * TK, tile % TILES * BV, h, H, L, l_t, o_t,
        K, V, C, TK, BV, False, DOT, PRECISION,
    )  # fmt: skip
    out = dcarried + ((run.to(tl.int64) * columns + column) * H + h) * (K * V)
    store_block(out, tile // TILES * TK, tile % TILES * BV, total, K, V, TK, BV)


@triton.jit(do_not_specialize=SIZES)
def node_backward_kernel(
    met, dmet, level_scales, do, dnodes, table, ends,
    T, N, H, L, cap,
    l_b, l_t, l_h, o_b, o_t, o_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A node that lies inside the first run of its sequence, one head, one [TK, BV] tile; adds to dnodes."""
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(ROWS * TILES, H)
    place, sequence = part % RUN, part // RUN  # the node ends with chunk `place` of the run
    z0 = tl.load(ends + sequence * 3 + 2)
    z_end = (z0 >> BITS << BITS) + place - 1
    node = node_row(z_end, z0, sequence, cap)
    if (place == 0) | (node < 0):
        return
    l = reader_level(z_end, cap, BITS)
    c = tl.load(ends + sequence * 3).to(tl.int64) + z0
    b, first, end, z, z0_, sequence_ = locate(c, table, T, N, C, PACKED)
    if (end <= first) | (sequence_ != sequence):
        return
    total = gather(
        met, dmet, level_scales + b * l_b + h * l_h, do + b * o_b + h * o_h, c, z_end + 1 + (1 << l) - z0, first, end,
        l, LOG_C + 1 + l, tile // TILES * TK, tile % TILES * BV, h, H, L, l_t, o_t,
        K, V, C, TK, BV, False, DOT, PRECISION,
    )  # fmt: skip
    out = dnodes + (node * H + h) * (K * V)
    total += load_block(out, tile // TILES * TK, tile % TILES * BV, K, V, TK, BV).to(tl.float32)
    store_block(out, tile // TILES * TK, tile % TILES * BV, total, K, V, TK, BV)
