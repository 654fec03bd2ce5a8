"""The past carried to the runs, differentiated.

    R = F R':   dR' = sum over the entries of the run of F^T dR,   dF = sum over the columns of dR R'^T

`run_scan_backward` begins with the dR that an entry's own slots got.
"""

# H heads, K key, V value
import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.delta_rule.layout import Tier
from loglinear.kernels.triton.delta_rule.reads import columns_read, count_reads, first_column, is_column_read
from loglinear.kernels.triton.delta_rule.states import SIZES, Inputs, Past, PastGradients, TierSizes
from loglinear.kernels.triton.delta_rule.tiles import locate_entries, row_decays
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.tiles import head_program, load_block, store_block
from loglinear.kernels.triton.walks import after


@triton.jit
def moved_back(
    transitions,
    totals,
    entry,
    dstate,
    row,
    column,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    MATH: tl.constexpr,
):
    """P^T dS, one [TK, BV] tile, of the transition in row `entry`, with its decay apart."""
    decay = tl.exp2(row_decays(totals, entry, row, K, TK))
    total = load_block(dstate, row, column, K, V, TK, BV).to(tl.float32) * decay
    for s in range(0, K, TK):
        transition_TT = load_block(transitions + entry * (K * K), s, row, K, K, TK, TK)
        dstate_TV = load_block(dstate, s, column, K, V, TK, BV).to(MATH.dot)
        total = tl.dot(tl.trans(transition_TT), dstate_TV, total, input_precision=MATH.precision)
    return total


@triton.jit
def add_back_through(
    total,
    past,
    entry,
    dstate,
    is_first,
    row,
    column,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    MATH: tl.constexpr,
):
    """total + F^T dR, one [TK, BV] tile; the first entry of a run has no F. entry: the row of its matrices."""
    if is_first:
        total += load_block(dstate, row, column, K, V, TK, BV).to(tl.float32)
    else:
        total += moved_back(past.prefixes, past.prefix_totals, entry, dstate, row, column, K, V, TK, BV, MATH)
    return total


@triton.jit
def add_outer(
    total,
    dreads,
    carried,
    reads,
    row,
    column,
    tier,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """total + the sum of dR R'^T over the carried columns that are read, one [TK, TK] tile."""
    for _ in range(count_reads(reads, TREE)):
        older = first_column(reads, tier.columns, TREE).to(tl.int64)
        reads = after(reads, TREE)
        dstate = dreads + (older + tier.num_slots - tier.collapsed) * tier.H * (K * V)
        state = carried + older * tier.H * (K * V)
        for x in range(0, V, BV):
            dstate_TV = load_block(dstate, row, x, K, V, TK, BV).to(MATH.dot)
            state_TV = load_block(state, column, x, K, V, TK, BV).to(MATH.dot)
            total = tl.dot(dstate_TV, tl.trans(state_TV), total, input_precision=MATH.precision)
    return total


@launcher
@triton.jit(do_not_specialize=SIZES)
def carry_in_states_backward_kernel(
    past,
    dreads,
    dcarried,
    table,
    H,
    per_row,
    cap,
    num_slots,
    columns,
    collapsed,
    first_block,
    places,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One column of what a run was carried, one head, one [TK, BV] tile: dcarried [run, column, H, K, V] from dreads
    [entry, place, H, K, V]."""
    tier = TierSizes(H, per_row, cap, num_slots, columns, collapsed, first_block, places)
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(ROWS * TILES, tier.H)
    older = part % columns
    run = locate_entries(part // columns, table, tier.per_row, TREE)
    if (run.stop <= run.start) | (is_column_read(run.number, older, columns, past.initial, TREE) == 0):
        return
    row, column = tile // TILES * TK, tile % TILES * BV
    total = tl.zeros([TK, BV], tl.float32)
    for i in range(run.start, run.stop):
        entry = (run.base + i) * tier.H + h
        dstate = dreads + (((run.base + i) * places + older + num_slots - collapsed) * tier.H + h) * (K * V)
        total = add_back_through(total, past, entry, dstate, i == run.start, row, column, K, V, TK, BV, MATH)
    out = dcarried + ((run.row.to(tl.int64) * columns + older) * tier.H + h) * (K * V)
    store_block(out, row, column, total, K, V, TK, BV)


@launcher
@triton.jit(do_not_specialize=SIZES)
def carry_in_prefixes_backward_kernel(
    past,
    dreads,
    dprefixes,
    table,
    H,
    per_row,
    cap,
    num_slots,
    columns,
    collapsed,
    first_block,
    places,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One entry of a run but the first, one head, one [TK, TK] tile: dprefixes [entry, H, K, K]."""
    tier = TierSizes(H, per_row, cap, num_slots, columns, collapsed, first_block, places)
    RUN: tl.constexpr = 1 << TREE.tier
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile, h, part = head_program(TILES * TILES, tier.H)
    run = locate_entries(part // RUN, table, tier.per_row, TREE)
    i = part % RUN
    if (i <= run.start) | (i >= run.stop):
        return
    row, column = tile // TILES * TK, tile % TILES * TK
    dprefix_TT = add_outer(
        tl.zeros([TK, TK], tl.float32),
        dreads + ((run.base + i) * places * tier.H + h) * (K * V),
        past.carried + (run.row * columns.to(tl.int64) * tier.H + h) * (K * V),
        columns_read(run.number, columns, past.initial, TREE),
        row,
        column,
        tier,
        K,
        V,
        TK,
        BV,
        TREE,
        MATH,
    )
    store_block(dprefixes + ((run.base + i) * tier.H + h) * (K * K), row, column, dprefix_TT, K, K, TK, TK)


def carry_in_backward(x: Inputs, tier: Tier, past: Past, dreads: Tensor) -> PastGradients:
    """The gradients of a tier's past by what was carried in to the tier below, dreads [entry, place, H, K, V]. The
    array for those of `kept` is empty: `run_scan_backward` fills it."""
    dpast = PastGradients(*(torch.empty_like(array) for array in (past.kept, past.prefixes, past.carried)))
    sizes = (tier.table, *x.tier_sizes(tier, dreads.shape[1]))
    if tier.columns > 0:
        grid = tier.runs * tier.columns * x.heads * x.tiling.all_tiles("carry_in_states_backward")
        carry_in_states_backward_kernel[(grid,)](
            past, dreads, dpast.carried, *sizes, TREE=x.tree, **x.constants("carry_in_states_backward")
        )
    grid = (tier.runs << x.tree.tier) * x.heads * x.tiling.square_tiles("carry_in_prefixes_backward")
    carry_in_prefixes_backward_kernel[(grid,)](
        past, dreads, dpast.prefixes, *sizes, TREE=x.tree, **x.constants("carry_in_prefixes_backward")
    )
    return dpast
