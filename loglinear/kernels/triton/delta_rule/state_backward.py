"""The reads between chunks, differentiated on the states' side.

dY[slot] = X^T diag(lambda) dO,   dF = X^T dX'           read by one chunk each
dR[column] = sum over the chunks of the run of X'^T diag(lambda) dO
"""

# C chunk, H heads, K key, V value, L levels
import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import Rows, Sizes
from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.delta_rule.reads import columns_read, count_reads, first_slot, is_column_read, slots_read
from loglinear.kernels.triton.delta_rule.states import SIZES, Inputs, Past, PastGradients, Queries
from loglinear.kernels.triton.delta_rule.tiles import head_rows, locate_entries, place_in_run
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import head_program, load_rows, locate, store_block
from loglinear.kernels.triton.walks import after


@triton.jit
def load_weighted(
    scales, do, n, level, L, column, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, MATH: tl.constexpr
):
    """diag(lambda) dO of one chunk, one tile of V."""
    DTYPE: tl.constexpr = scales.data.dtype.element_ty
    weight = prefetched(load_scale(scales.data, scales.t, n, level, L, tl.arange(0, C)), DTYPE)
    do_CV = load_rows(do.data, do.t, n, column, C, V, BV).to(tl.float32)
    return (do_CV * weight[:, None]).to(MATH.dot)


@launcher
@triton.jit(do_not_specialize=SIZES)
def state_backward_kernel(
    q_in,
    level_scales,
    do,
    dkept,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    num_slots,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk, one head, one [TK, BV] tile of dY, which is 0 of a chunk without tokens."""
    sizes = Sizes(T, N, H, R, L, cap)
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, c = head_program(ROWS * TILES, sizes.H)
    row, column = tile // TILES * TK, tile % TILES * BV
    chunk = locate(c.to(tl.int64), table, sizes, C)
    reads = slots_read(chunk.z & ((1 << TREE.tier) - 1), num_slots, TREE)
    x_CT = load_rows(q_in + (chunk.c * sizes.H + h) * (C * K), K, chunk.n, row, C, K, TK)
    scales, do_rows = head_rows(level_scales, chunk, h), head_rows(do, chunk, h)
    for _ in range(count_reads(reads, TREE)):
        slot = first_slot(reads, TREE)
        reads = after(reads, TREE)
        do_CV = load_weighted(scales, do_rows, chunk.n, slot + TREE.column, L, column, V, C, BV, MATH)
        dstate_TV = tl.dot(tl.trans(x_CT), do_CV, input_precision=MATH.precision)
        out = dkept + ((chunk.c * num_slots + slot) * sizes.H + h) * (K * V)
        store_block(out, row, column, dstate_TV, K, V, TK, BV)


@launcher
@triton.jit(do_not_specialize=SIZES)
def prefix_backward_kernel(
    q_in,
    dq_run,
    past,
    dprefixes,
    table,
    first_runs,
    T,
    N,
    H,
    R,
    L,
    cap,
    columns,
    K: tl.constexpr,
    C: tl.constexpr,
    TK: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk, one head, one [TK, TK] tile of dF, which is 0 where nothing came through F."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile, h, c = head_program(TILES * TILES, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    place = place_in_run(chunk, first_runs, N, TREE)
    if place.i <= place.start:
        return
    row, column = tile // TILES * TK, tile % TILES * TK
    n = tl.where(columns_read(place.number, columns, past.initial, TREE) > 0, chunk.n, 0)
    matrix = chunk.c * sizes.H + h
    x_CT = load_rows(q_in + matrix * (C * K), K, n, row, C, K, TK)
    dx_CT = load_rows(dq_run + matrix * (C * K), K, n, column, C, K, TK)
    dprefix_TT = tl.dot(tl.trans(x_CT), dx_CT, input_precision=MATH.precision)
    store_block(dprefixes + matrix * (K * K), row, column, dprefix_TT, K, K, TK, TK)


@launcher
@triton.jit(do_not_specialize=SIZES)
def carried_backward_kernel(
    q_run,
    level_scales,
    do,
    past,
    dcarried,
    table,
    runs,
    T,
    N,
    H,
    R,
    L,
    cap,
    columns,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One column of what one run was carried, one head, one [TK, BV] tile of dR."""
    sizes = Sizes(T, N, H, R, L, cap)
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(ROWS * TILES, sizes.H)
    place = part % columns
    run = locate_entries(part // columns, runs, N, TREE)
    if (run.stop <= run.start) | (is_column_read(run.number, place, columns, past.initial, TREE) == 0):
        return
    row, column = tile // TILES * TK, tile % TILES * BV
    total = tl.zeros([TK, BV], tl.float32)
    for entry in range(run.start, run.stop):
        chunk = locate(run.base + entry, table, sizes, C)
        x_CT = load_rows(q_run + (chunk.c * sizes.H + h) * (C * K), K, chunk.n, row, C, K, TK)
        do_CV = load_weighted(
            head_rows(level_scales, chunk, h),
            head_rows(do, chunk, h),
            chunk.n,
            place + (TREE.column + TREE.run_read),
            L,
            column,
            V,
            C,
            BV,
            MATH,
        )
        total = tl.dot(tl.trans(x_CT), do_CV, total, input_precision=MATH.precision)
    out = dcarried + ((run.row.to(tl.int64) * columns + place) * sizes.H + h) * (K * V)
    store_block(out, row, column, total, K, V, TK, BV)


def past_backward(x: Inputs, q_in: Tensor, queries: Queries, past: Past, do: Rows) -> PastGradients:
    """The gradients of the chunks' past by their reads."""
    y, tier, C, tiling = x.layout, x.layout.tiers[0], x.chunk_size, x.tiling
    dpast = PastGradients(*(torch.empty_like(array) for array in (past.kept, past.prefixes, past.carried)))
    state_backward_kernel[(y.chunks * x.heads * tiling.all_tiles("state_backward"),)](
        q_in,
        x.level_scales,
        do,
        dpast.kept,
        y.table,
        *x.sizes,
        tier.slots,
        C=C,
        TREE=x.tree,
        **x.constants("state_backward"),
    )
    prefix_backward_kernel[(y.chunks * x.heads * tiling.square_tiles("prefix_backward"),)](
        q_in,
        queries.dq_run,
        past,
        dpast.prefixes,
        y.table,
        y.first_runs,
        *x.sizes,
        tier.columns,
        C=C,
        TREE=x.tree,
        **x.key_constants("prefix_backward"),
    )
    if tier.columns > 0:
        carried_backward_kernel[(tier.runs * tier.columns * x.heads * tiling.all_tiles("carried_backward"),)](
            queries.q_run,
            x.level_scales,
            do,
            past,
            dpast.carried,
            y.table,
            tier.table,
            *x.sizes,
            tier.columns,
            C=C,
            TREE=x.tree,
            **x.constants("carried_backward"),
        )
    return dpast
