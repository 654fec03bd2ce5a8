"""The reads between chunks, differentiated on the queries' side.

    at each read O += diag(lambda) X S:    dX += diag(lambda) dO S^T,   dlambda = rowsum(X * dO S^T)
    through X' = X F:                      dX += dX' F^T

X' and dX', at the start of the run, are what the gradients of what was carried there and of F are made of.
"""

# C chunk, I of its rows, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.delta_rule.output import through_prefix
from loglinear.kernels.triton.delta_rule.tiles import (
    BITS,
    SIZES,
    columns_read,
    count_bits,
    locate_in_run,
    part_program,
    slots_read,
)
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import load_block, load_rows, store_block
from loglinear.kernels.triton.walks import nearest


@triton.jit
def pull_state(
    x, dx, weight, do_rows, o_t, n, state,
    K: tl.constexpr, V: tl.constexpr, I: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """dX + diag(lambda) dO S^T, and dlambda."""
    dscale = tl.zeros([I], tl.float32)
    new = ()
    for t in tl.static_range((K + TK - 1) // TK):
        pulled_IT = tl.zeros([I, TK], tl.float32)
        for column in range(0, V, BV):
            do_IV = load_rows(do_rows, o_t, n, column, I, V, BV).to(MATH.dot)
            state_TV = load_block(state, t * TK, column, K, V, TK, BV)
            pulled_IT = tl.dot(do_IV, tl.trans(state_TV), pulled_IT, input_precision=MATH.precision)
        dscale += tl.sum(pulled_IT * x[t].to(tl.float32), 1)
        new = new + (dx[t] + pulled_IT * weight[:, None],)
    return new, dscale


@triton.jit
def back_through_prefix(dx, prefix, log_decay, K: tl.constexpr, TK: tl.constexpr, MATH: tl.constexpr):
    """dX' F^T."""
    new = ()
    for t in tl.static_range((K + TK - 1) // TK):
        y_IT = dx[t] * tl.exp2(log_decay)
        for j in tl.static_range((K + TK - 1) // TK):
            prefix_TT = load_block(prefix, t * TK, j * TK, K, K, TK, TK)
            y_IT = tl.dot(dx[j].to(MATH.dot), tl.trans(prefix_TT), y_IT, input_precision=MATH.precision)
        new = new + (y_IT,)
    return new


@triton.jit
def store_tiles(out, x, K: tl.constexpr, I: tl.constexpr, TK: tl.constexpr):
    for t in tl.static_range((K + TK - 1) // TK):
        store_block(out, 0, t * TK, x[t], I, K, I, TK)


@triton.jit
def load_tiles(base, K: tl.constexpr, I: tl.constexpr, TK: tl.constexpr):
    x = ()
    for t in tl.static_range((K + TK - 1) // TK):
        x = x + (load_block(base, 0, t * TK, I, K, I, TK),)
    return x


@triton.jit(do_not_specialize=SIZES)
def walk_backward_kernel(
    level_scales, seen, kept, prefixes, prefix_totals, carried, do, dseen, brought, dbrought, dlevel_scales, table,
    first_runs,
    T, N, H, L, num_slots, columns,
    l_b, l_t, l_h, o_b, o_t, o_h, dl_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, PARTS: tl.constexpr,
    TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """C / PARTS rows of one chunk, one head. From seen, X [chunk, H, C, K], dX and, where something is carried, X' and
    dX', brought and dbrought; and the columns of dlevel_scales that the walk reads, others it leaves. What it gives to
    a last column that the chunk shares is there for `scores_backward` to add to."""
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    I: tl.constexpr = C // PARTS
    h, c, b, first, z, z0, sequence, n_keys, skipped, n = part_program(table, T, N, H, C, PARTS, PACKED)
    if n_keys <= 0:
        return
    first += skipped
    i, row, last = tl.arange(0, I), c * H + h, L - 1
    tile = (row * C + skipped) * K
    scales = level_scales + b * l_b + first * l_t + h * l_h
    do_rows = do + b * o_b + first * o_t + h * o_h
    inside = i < n
    to = dlevel_scales + (b * T + first) * dl_t + h * L + i * dl_t
    shared = tl.zeros([I], tl.float32)  # of the last column
    place, start, run = locate_in_run(z, z0, sequence, first_runs, N, PACKED)

    dx = ()
    for _t in tl.static_range((K + TK - 1) // TK):
        dx = dx + (tl.zeros([I, TK], tl.float32),)
    reads = columns_read(z >> BITS, columns, NODES)
    if reads > 0:
        prefix, through = prefixes + row * (K * K), place > start
        log_decay = tl.load(prefix_totals + row, mask=through, other=0.0)
        x = load_tiles(seen + tile, K, I, TK)
        if through:
            x = through_prefix(x, prefix, log_decay, K, TK, MATH)
        store_tiles(brought + tile, x, K, I, TK)
        carried += (run * columns * H + h) * (K * V)
        for _ in range(count_bits(reads)):
            column = nearest(reads)
            reads &= reads - 1
            at = tl.minimum(column + (LOG_C + 1 + BITS), last)
            weight = prefetched(load_scale(scales, l_t, n, at, L, i), DTYPE)
            state = carried + column.to(tl.int64) * H * (K * V)
            dx, dscale = pull_state(x, dx, weight, do_rows, o_t, n, state, K, V, I, TK, BV, MATH)
            tl.store(to + at, dscale.to(dlevel_scales.dtype.element_ty), mask=inside & (at < last))
            shared += tl.where(at < last, 0.0, dscale)
        store_tiles(dbrought + tile, dx, K, I, TK)
        if through:
            dx = back_through_prefix(dx, prefix, log_decay, K, TK, MATH)
    x, reads = load_tiles(seen + tile, K, I, TK), slots_read(place, num_slots)
    kept += (c * num_slots * H + h) * (K * V)
    for _ in range(count_bits(reads)):
        slot = nearest(reads)
        reads &= reads - 1
        at = tl.minimum(slot + (LOG_C + 1), last)
        weight = prefetched(load_scale(scales, l_t, n, at, L, i), DTYPE)
        state = kept + slot.to(tl.int64) * H * (K * V)
        dx, dscale = pull_state(x, dx, weight, do_rows, o_t, n, state, K, V, I, TK, BV, MATH)
        tl.store(to + at, dscale.to(dlevel_scales.dtype.element_ty), mask=inside & (at < last))
        shared += tl.where(at < last, 0.0, dscale)
    store_tiles(dseen + tile, dx, K, I, TK)
    tl.store(to + last, shared.to(dlevel_scales.dtype.element_ty), mask=inside)
