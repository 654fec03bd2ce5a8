"""The reads between chunks, differentiated on the queries' side.

    at each read O += diag(lambda) X S:    dX += diag(lambda) dO S^T,   dlambda = rowsum(X * dO S^T)
    through X' = X F:                      dX += dX' F^T

X' and dX', at the start of the run, are what the gradients of what was carried there and of F are made of.
"""

# C chunk, I of its rows, H heads, K key, V value, L levels
import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import Rows, Sizes, Slab
from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.delta_rule.output import through_prefix
from loglinear.kernels.triton.delta_rule.reads import columns_read, count_reads, first_column, first_slot, slots_read
from loglinear.kernels.triton.delta_rule.states import SIZES, Inputs, Past, Queries
from loglinear.kernels.triton.delta_rule.tiles import column_decays, head_rows, part_of_head, place_in_run
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import load_block, load_rows, slab_at, store_block
from loglinear.kernels.triton.walks import after


@triton.jit
def pull_state(
    x,
    dx,
    weight,
    do,
    n,
    state,
    K: tl.constexpr,
    V: tl.constexpr,
    I: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    MATH: tl.constexpr,
):
    """dX + diag(lambda) dO S^T, and dlambda."""
    dscale = tl.zeros([I], tl.float32)
    new = ()
    for t in tl.static_range((K + TK - 1) // TK):
        pulled_IT = tl.zeros([I, TK], tl.float32)
        for column in range(0, V, BV):
            do_IV = load_rows(do.data, do.t, n, column, I, V, BV).to(MATH.dot)
            state_TV = load_block(state, t * TK, column, K, V, TK, BV)
            pulled_IT = tl.dot(do_IV, tl.trans(state_TV), pulled_IT, input_precision=MATH.precision)
        dscale += tl.sum(pulled_IT * x[t].to(tl.float32), 1)
        new = new + (dx[t] + pulled_IT * weight[:, None],)
    return new, dscale


@triton.jit
def back_through_prefix(dx, past, entry, K: tl.constexpr, TK: tl.constexpr, MATH: tl.constexpr):
    """dX' F^T of the entry in this row."""
    prefix, new = past.prefixes + entry * (K * K), ()
    for t in tl.static_range((K + TK - 1) // TK):
        y_IT = dx[t] * tl.exp2(column_decays(past.prefix_totals, entry, t * TK, K, TK))
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


@launcher
@triton.jit(do_not_specialize=SIZES)
def walk_backward_kernel(
    level_scales,
    q_in,
    past,
    do,
    queries,
    dlevel_scales,
    table,
    first_runs,
    T,
    N,
    H,
    R,
    L,
    cap,
    num_slots,
    columns,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """C / PARTS rows of one chunk, one head. From q_in, X [chunk, H, C, K], `queries`: dX and, where something is
    carried, X' and dX'; and the columns of dlevel_scales that the walk reads, others it leaves. `scores_backward`
    adds to the last column where the chunk shares it."""
    sizes = Sizes(T, N, H, R, L, cap)
    DTYPE: tl.constexpr = level_scales.data.dtype.element_ty
    I: tl.constexpr = C // PARTS
    part = part_of_head(table, sizes, C, PARTS)
    chunk, own, h, n = part.whole, part.own, part.h, part.own.n
    if chunk.n <= 0:
        return
    i, row, last = tl.arange(0, I), chunk.c * sizes.H + h, L - 1
    tile = (row * C + part.first) * K
    scales, do_rows = head_rows(level_scales, own, h), head_rows(do, own, h)
    inside = i < n
    to = slab_at(dlevel_scales, own, sizes, h, L) + i * dlevel_scales.t
    dtype = dlevel_scales.data.dtype.element_ty
    shared = tl.zeros([I], tl.float32)  # of the last column
    place = place_in_run(chunk, first_runs, N, TREE)

    dx = ()
    for _t in tl.static_range((K + TK - 1) // TK):
        dx = dx + (tl.zeros([I, TK], tl.float32),)
    reads = columns_read(place.number, columns, past.initial, TREE)
    if reads > 0:
        through = place.i > place.start
        x = load_tiles(q_in + tile, K, I, TK)
        if through:
            x = through_prefix(x, past, row, K, TK, MATH)
        store_tiles(queries.q_run + tile, x, K, I, TK)
        carried = past.carried + (place.run * columns * sizes.H + h) * (K * V)
        for _ in range(count_reads(reads, TREE)):
            column = first_column(reads, columns, TREE)
            reads = after(reads, TREE)
            at = tl.minimum(column + (TREE.column + TREE.run_read), last)
            weight = prefetched(load_scale(scales.data, scales.t, n, at, L, i), DTYPE)
            state = carried + column.to(tl.int64) * sizes.H * (K * V)
            dx, dscale = pull_state(x, dx, weight, do_rows, n, state, K, V, I, TK, BV, MATH)
            tl.store(to + at, dscale.to(dtype), mask=inside & (at < last))
            shared += tl.where(at < last, 0.0, dscale)
        store_tiles(queries.dq_run + tile, dx, K, I, TK)
        if through:
            dx = back_through_prefix(dx, past, row, K, TK, MATH)
    x, reads = load_tiles(q_in + tile, K, I, TK), slots_read(place.i, num_slots, TREE)
    kept = past.kept + (chunk.c * num_slots * sizes.H + h) * (K * V)
    for _ in range(count_reads(reads, TREE)):
        slot = first_slot(reads, TREE)
        reads = after(reads, TREE)
        at = tl.minimum(slot + TREE.column, last)
        weight = prefetched(load_scale(scales.data, scales.t, n, at, L, i), DTYPE)
        state = kept + slot.to(tl.int64) * sizes.H * (K * V)
        dx, dscale = pull_state(x, dx, weight, do_rows, n, state, K, V, I, TK, BV, MATH)
        tl.store(to + at, dscale.to(dtype), mask=inside & (at < last))
        shared += tl.where(at < last, 0.0, dscale)
    store_tiles(queries.dq_in + tile, dx, K, I, TK)
    tl.store(to + last, shared.to(dtype), mask=inside)


def walk_backward(x: Inputs, q_in: Tensor, past: Past, do: Rows, dlevel_scales: Slab) -> Queries:
    """Write dlambda of the levels between chunks; return the queries' side of the reads. past: of the chunks."""
    y, parts = x.layout, x.tiling.parts("walk_backward")
    queries = Queries(*(torch.empty_like(q_in) for _ in range(3)))
    walk_backward_kernel[(y.chunks * parts * x.heads,)](
        x.level_scales,
        q_in,
        past,
        do,
        queries,
        dlevel_scales,
        y.table,
        y.first_runs,
        *x.sizes,
        y.tiers[0].slots,
        y.tiers[0].columns,
        C=x.chunk_size,
        PARTS=parts,
        TREE=x.tree,
        **x.constants("walk_backward"),
    )
    return queries
