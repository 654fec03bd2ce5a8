"""The past before a run, carried to its start.

Entry i of a run of the next tier is the run that the past is carried to. It reads what was kept for it in its own run,
and through F what had been carried to the start of its own run:

    R[column] = Y[slot] + F R'[column'],   each where there is one

and for a sequence's end, the start of its unfinished chunk, the same is its final state.
"""

# H heads, K key, V value
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.delta_rule.layout import Tier
from loglinear.kernels.triton.delta_rule.reads import is_column_read, is_slot_read, older_column
from loglinear.kernels.triton.delta_rule.states import SIZES, Inputs, Past, TierSizes
from loglinear.kernels.triton.delta_rule.tiles import EntryPlace, locate_entries, row_decays
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.tiles import head_program, load_block, store_block


@triton.jit
def add_through(
    total,
    past,
    entry,
    state,
    is_first,
    row,
    column,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    MATH: tl.constexpr,
):
    """total + F R, one [TK, BV] tile; the first entry of a run has no F. entry: the row of its matrices."""
    state_TV = load_block(state, row, column, K, V, TK, BV).to(tl.float32)
    if is_first:
        total += state_TV
    else:
        total += state_TV * tl.exp2(row_decays(past.prefix_totals, entry, row, K, TK))
        for s in range(0, K, TK):
            prefix_TT = load_block(past.prefixes + entry * (K * K), row, s, K, K, TK, TK)
            source_TV = load_block(state, s, column, K, V, TK, BV).to(MATH.dot)
            total = tl.dot(prefix_TT, source_TV, total, input_precision=MATH.precision)
    return total


@triton.jit
def store_read(
    past,
    out,
    entry,
    place,
    h,
    column,
    tier,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """out = what an entry (an `EntryPlace`) reads in column `place`, one tile of V."""
    SIZE: tl.constexpr = K * V
    row, older = entry.row * tier.H + h, older_column(place, tier)
    is_kept = is_slot_read(entry.i, place, tier.num_slots, TREE)
    is_carried = is_column_read(entry.number, tl.maximum(older, 0), tier.columns, past.initial, TREE)
    is_carried = (older >= 0) & (is_carried > 0)
    for a in range(0, K, TK):
        state_TV = tl.zeros([TK, BV], tl.float32)
        if is_kept:
            block = past.kept + ((entry.row * tier.num_slots + place) * tier.H + h) * SIZE
            state_TV += load_block(block, a, column, K, V, TK, BV).to(tl.float32)
        if is_carried:
            block = past.carried + ((entry.run.to(tl.int64) * tier.columns + older) * tier.H + h) * SIZE
            is_first = entry.i == entry.start
            state_TV = add_through(state_TV, past, row, block, is_first, a, column, K, V, TK, BV, MATH)
        store_block(out, a, column, state_TV, K, V, TK, BV)


@launcher
@triton.jit(do_not_specialize=SIZES)
def carry_in_kernel(
    past,
    out,
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
    """One entry of a run, one column of what it is carried, one head, one tile of V: out [entry, place, H, K, V]."""
    tier = TierSizes(H, per_row, cap, num_slots, columns, collapsed, first_block, places)
    RUN: tl.constexpr = 1 << TREE.tier
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(TILES, tier.H)
    place, i, number = part % places, part // places % RUN, part // places // RUN
    run = locate_entries(number, table, tier.per_row, TREE)
    if (i < run.start) | (i >= run.stop):
        return
    row = run.base + i
    entry = EntryPlace(row, i, run.start, run.row, run.number)
    out += ((row * places + place) * tier.H + h) * (K * V)
    store_read(past, out, entry, place, h, tile * BV, tier, K, V, TK, BV, TREE, MATH)


def carry_in(x: Inputs, tier: Tier, past: Past, below: Tier) -> Tensor:
    """The past carried to the runs of the tier below, which are the entries of this one: [run, column, H, K, V]."""
    places = below.columns
    carried = x.empty(tier.entries, places, x.heads, x.key_dim, x.value_dim, dtype=x.dtype)
    carry_in_kernel[((tier.runs << x.tree.tier) * places * x.heads * x.tiling.tiles("carry_in"),)](
        past, carried, tier.table, *x.tier_sizes(tier, places), TREE=x.tree, **x.constants("carry_in")
    )
    return carried
