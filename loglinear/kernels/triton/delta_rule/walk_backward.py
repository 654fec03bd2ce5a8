"""The reads between chunks, differentiated on the queries' side.

    back through X <- X P_block:     dX <- dX P_block^T
    at each read O += diag(lambda) X S:   dX += diag(lambda) dO S^T,   dlambda = rowsum(X * dO S^T)

A first pass keeps the X that each block met, the second goes back from the farthest. Both, X and the gradient dX' of
what X became, are what the blocks' own gradients are made of (`state_backward`).
"""

# C chunk, I of its rows, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.output import run_row, through_transition
from loglinear.kernels.triton.delta_rule.tiles import BITS, RUN, columns_of, count_bits, part_program, reads_of
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import (
    SIZES,
    arrived,
    exponent,
    load_block,
    load_rows,
    store_block,
)
from loglinear.kernels.triton.walks import nearest, slot_pointer

MET = tl.constexpr(4)  # tiles of X that a chunk keeps: one for each level of a run, and one for what was carried there


@triton.jit
def pull_state(
    x, dx, weight, do_rows, o_t, n, state,
    K: tl.constexpr, V: tl.constexpr, I: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX + diag(lambda) dO S^T, and dlambda."""
    dscale = tl.zeros([I], tl.float32)
    new = ()
    for t in tl.static_range((K + TK - 1) // TK):
        pulled_IT = tl.zeros([I, TK], tl.float32)
        for column in range(0, V, BV):
            do_IV = load_rows(do_rows, o_t, n, column, I, V, BV).to(DOT)
            state_TV = load_block(state, t * TK, column, K, V, TK, BV)
            pulled_IT = tl.dot(do_IV, tl.trans(state_TV), pulled_IT, input_precision=PRECISION)
        dscale += tl.sum(pulled_IT * x[t].to(tl.float32), 1)
        new = new + (dx[t] + pulled_IT * weight[:, None],)
    return new, dscale


@triton.jit
def back_through_transition(
    dx, transition, K: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """dX P^T."""
    new = ()
    for t in tl.static_range((K + TK - 1) // TK):
        block = load_block(transition, t * TK, 0, K, K, TK, TK)
        y_IT = tl.dot(dx[0].to(DOT), tl.trans(block), input_precision=PRECISION)
        for j in tl.static_range(1, (K + TK - 1) // TK):
            block = load_block(transition, t * TK, j * TK, K, K, TK, TK)
            y_IT = tl.dot(dx[j].to(DOT), tl.trans(block), y_IT, input_precision=PRECISION)
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
    level_scales, seen, transitions, slots, nodes, carried, do, met, dmet, dlevel_scales, table, first_runs,
    T, N, H, L, cap, columns,
    l_b, l_t, l_h, o_b, o_t, o_h, dl_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, PARTS: tl.constexpr,
    TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """C / PARTS rows of one chunk, one head. Writes met and dmet [chunk, H, MET, C, K] (X at each read, and dX' behind
    it), the gradient of X where the walk begins in the place of X, seen [chunk, H, C, K], and the columns of
    dlevel_scales that it reads, others it leaves; what the walk gives to a last column that the chunk shares is there
    for `scores_backward` to add to."""
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    I: tl.constexpr = C // PARTS
    TILE: tl.constexpr = C * K
    h, c, b, first, z, z0, sequence, n_keys, skipped, n = part_program(table, T, N, H, C, PARTS, PACKED)
    if n_keys <= 0:
        return
    first += skipped
    i, row, last = tl.arange(0, I), c * H + h, L - 1
    scales = level_scales + b * l_b + first * l_t + h * l_h
    do_rows = do + b * o_b + first * o_t + h * o_h
    met += row * MET * TILE + skipped * K
    dmet += row * MET * TILE + skipped * K
    seen += row * TILE + skipped * K
    x = load_tiles(seen, K, I, TK)
    reads = reads_of(z, z0, cap)
    low, column_set = reads & (RUN - 1), columns_of(reads, cap, BITS)
    remaining = low
    for _ in range(count_bits(low)):
        l = nearest(remaining)
        remaining &= remaining - 1
        store_tiles(met + l * TILE, x, K, I, TK)
        block_end = (z >> l) << l
        if (block_end > z0) & ((remaining > 0) | (column_set > 0)):
            x = through_transition(x, transitions + ((c - z + block_end - 1) * H + h) * (K * K), K, TK, DOT, PRECISION)
    store_tiles(met + BITS * TILE, x, K, I, TK)
    tl.debug_barrier()

    dx = ()
    for _ in tl.static_range((K + TK - 1) // TK):
        dx = dx + (tl.zeros([I, TK], tl.float32),)
    inside = i < n
    to = dlevel_scales + (b * T + first) * dl_t + h * L + i * dl_t
    shared = tl.zeros([I], tl.float32)  # of the last column
    carried += run_row(c, z, z0, sequence, first_runs, N, PACKED) * columns * H * (K * V)
    is_read = column_set > 0  # is there anything beyond?
    for _ in range(count_bits(column_set)):
        column = nearest(column_set)
        column_set &= column_set - 1
        at = tl.minimum(column + (LOG_C + 1 + BITS), last)
        weight = arrived(load_scale(scales, l_t, n, at, L, i), DTYPE)
        dx, dscale = pull_state(
            x, dx, weight, do_rows, o_t, n, carried + (column * H + h) * (K * V), K, V, I, TK, BV, DOT, PRECISION
        )
        tl.store(to + at, dscale.to(dlevel_scales.dtype.element_ty), mask=inside & (at < last))
        shared += tl.where(at < last, 0.0, dscale)
    for _ in range(count_bits(low)):
        l = exponent(low)  # the farthest
        low -= 1 << l
        at = tl.minimum(l + (LOG_C + 1), last)
        weight = arrived(load_scale(scales, l_t, n, at, L, i), DTYPE)
        store_tiles(dmet + l * TILE, dx, K, I, TK)
        x = load_tiles(met + l * TILE, K, I, TK)
        block_end = (z >> l) << l
        if (block_end > z0) & is_read:
            transition = transitions + ((c - z + block_end - 1) * H + h) * (K * K)
            dx = back_through_transition(dx, transition, K, TK, DOT, PRECISION)
        is_read = l >= 0
        slot = slot_pointer(slots, nodes, c, z, z0, sequence, l, cap, h, H, K * V, NODES)
        dx, dscale = pull_state(x, dx, weight, do_rows, o_t, n, slot, K, V, I, TK, BV, DOT, PRECISION)
        tl.store(to + at, dscale.to(dlevel_scales.dtype.element_ty), mask=inside & (at < last))
        shared += tl.where(at < last, 0.0, dscale)
    store_tiles(seen, dx, K, I, TK)
    tl.store(to + last, shared.to(dlevel_scales.dtype.element_ty), mask=inside)
