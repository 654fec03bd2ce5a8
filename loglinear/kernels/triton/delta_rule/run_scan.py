"""The past inside a run, brought to the start of each of its entries.

Entry i of a run reads one state for each bit of i, the block of as many entries before it; bits from the last slot on
share one. It reads the past before the run through the transition from its start. With P_i = exp(Gam_i) I + D_i and S_i
of the entries themselves, and Y_i the states that entry i reads,

    Y_{i+1}[t] = P_i sum(Y_i[j], j <= t) + S_i,  t = ctz(i + 1)      entry i, with the blocks that it merges with
    Y_{i+1}[j] = P_i Y_i[j],  j > t
    F_{i+1} = P_i F_i                                               from the run's start

With a larger radix Y_i[j] is entry i - 1 - j alone, in the last slot with all before it, until the run is whole:

    Y_{i+1}[0] = S_i,   Y_{i+1}[j + 1] = P_i Y_i[j],   the last slot: P_i times the sum of the last two

which behind the last entry is the run as one entry of the next tier. Each of these states is read by one entry: its
gradient needs no gathering, and what keys that come again have erased of it is no longer in it to be rounded.
"""

# H heads, K key, V value, i number of an entry in its run, j slot
import torch
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.layout import Tier
from loglinear.kernels.triton.delta_rule.reads import (
    count_moves,
    count_reads,
    first_move,
    first_slot,
    slots_read,
    step_of,
)
from loglinear.kernels.triton.delta_rule.states import SIZES, Entries, Inputs, Past, TierSizes, Totals
from loglinear.kernels.triton.delta_rule.tiles import column_decays, locate_entries, row_decays
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.tiles import head_program, load_block, store_block
from loglinear.kernels.triton.walks import after, block_row

# Triton 3.6 cannot compare with None a tuple that has a None inside a further tuple, but each of its fields.
NO_ENDS = Entries(None, Totals(None), None)  # type: ignore[arg-type]


@triton.jit
def sum_of_slots(
    states,
    members,
    row,
    column,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
):
    """A [TK, BV] tile of the sum of an entry's states [slot, H, K, V] that are members."""
    total = tl.zeros([TK, BV], tl.float32)
    for _ in range(count_reads(members, TREE)):
        total += load_block(states + first_slot(members, TREE).to(tl.int64) * H * (K * V), row, column, K, V, TK, BV)
        members = after(members, TREE)
    return total


@triton.jit
def add_moved(
    total,
    states,
    members,
    entries,
    entry,
    row,
    column,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """total + P of an entry, given by its row, times the sum of the members, one [TK, BV] tile."""
    decay = tl.exp2(row_decays(entries.totals, entry, row, K, TK))
    for s in range(0, K, TK):
        sum_TV = sum_of_slots(states, members, s, column, H, K, V, TK, BV, TREE)
        total += tl.where(s == row, decay, 0.0) * sum_TV
        transition_TT = load_block(entries.transitions + entry * (K * K), row, s, K, K, TK, TK)
        total = tl.dot(transition_TT, sum_TV.to(transition_TT.dtype), total, input_precision=MATH.precision)
    return total


@triton.jit
def store_initial(
    past,
    run,
    h,
    column,
    tier,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
):
    """The blocks of the initial state are the past of a continued sequence's first entry, one tile of V."""
    SIZE: tl.constexpr = K * V
    H, num_slots = tier.H, tier.num_slots
    reads = tl.where(run.start < run.stop, slots_read(run.start, num_slots, TREE), 0)
    for _ in range(count_reads(reads, TREE)):
        j = first_slot(reads, TREE)
        reads = after(reads, TREE)
        m = tl.minimum(tier.first_block + j, tier.cap)
        block = past.initial + block_row(run.sequence, m, tier, h) * SIZE
        target = past.kept + (((run.base + run.start) * num_slots + j) * H + h) * SIZE
        # The prefix is carried.
        is_block = (tier.first_block + j < tier.cap).to(tl.float32)
        for a in range(0, K, TK):
            state_TV = load_block(block, a, column, K, V, TK, BV) * is_block
            store_block(target, a, column, state_TV, K, V, TK, BV)


@triton.jit
def scan_states(
    entries,
    past,
    ends,
    run,
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
    """One tile of V: Y, and the run's S."""
    SIZE: tl.constexpr = K * V
    H, num_slots = tier.H, tier.num_slots
    if past.initial is not None:
        store_initial(past, run, h, column, tier, K, V, TK, BV, TREE)
    for i in range(run.start, run.stop - 1 + run.has_end.to(tl.int32)):
        row = run.base + i
        entry, kept_here = row * H + h, past.kept + (row * num_slots * H + h) * SIZE
        t, merged, moved = step_of(i, num_slots, TREE)
        target = past.kept + (((row + 1) * num_slots + t) * H + h) * SIZE
        if ends.states is not None:
            target = tl.where(i == (1 << TREE.tier) - 1, ends.states + (run.row.to(tl.int64) * H + h) * SIZE, target)
        tl.debug_barrier()  # what this program wrote for entry i is seen
        for a in range(0, K, TK):
            state_TV = load_block(entries.states + entry * SIZE, a, column, K, V, TK, BV).to(tl.float32)
            if merged > 0:
                state_TV = add_moved(
                    state_TV, kept_here, merged, entries, entry, a, column, H, K, V, TK, BV, TREE, MATH
                )
            store_block(target, a, column, state_TV, K, V, TK, BV)
        for _ in range(count_moves(moved, num_slots, TREE)):
            members, j, moved = first_move(moved, num_slots, TREE)
            target = past.kept + (((row + 1) * num_slots + j) * H + h) * SIZE
            for a in range(0, K, TK):
                state_TV = tl.zeros([TK, BV], tl.float32)
                state_TV = add_moved(
                    state_TV, kept_here, members, entries, entry, a, column, H, K, V, TK, BV, TREE, MATH
                )
                store_block(target, a, column, state_TV, K, V, TK, BV)


@triton.jit
def store_total(totals, ends, entry, end, is_end, log_decay, first, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a run's decay so far, of the channels from `first` on: as that of an entry, or of the end."""
    if totals.channels is not None:
        channel, target = first + tl.arange(0, COLUMNS), totals.channels + entry * K
        if ends.states is not None:
            target = tl.where(is_end, ends.totals.channels + end * K, target)
        tl.store((target + channel)[None, :], log_decay, mask=(channel < K)[None, :])
    else:
        target = totals.heads + entry
        if ends.states is not None:
            target = tl.where(is_end, ends.totals.heads + end, target)
        tl.store(target, log_decay)


@triton.jit
def scan_transitions(
    entries,
    past,
    ends,
    run,
    h,
    column,
    tier,
    K: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One tile of columns of F, kept in registers: its D and log decay, and the run's P.
    With P = g + D, F = f + E, where g and f are diagonal:  P F = g f + g E + D E + D f."""
    SIZE: tl.constexpr = K * K
    COUNT: tl.constexpr = (K + TK - 1) // TK
    H = tier.H
    path = ()
    log_decay = tl.zeros([1, BV], tl.float32) if entries.totals.channels is not None else tl.zeros([], tl.float32)
    for _ in tl.static_range(COUNT):
        path = path + (tl.zeros([TK, BV], MATH.dot),)
    for i in range(run.start, run.stop - 1 + run.has_end.to(tl.int32)):
        entry = (run.base + i) * H + h
        transition, target = entries.transitions + entry * SIZE, past.prefixes + (entry + H) * SIZE
        end, is_end = run.row.to(tl.int64) * H + h, i == (1 << TREE.tier) - 1
        if ends.states is not None:
            target = tl.where(is_end, ends.transitions + end * SIZE, target)
        new = ()
        for a in tl.static_range(COUNT):
            path_TV = load_block(transition, a * TK, column, K, K, TK, BV).to(tl.float32) * tl.exp2(log_decay)
            path_TV += path[a].to(tl.float32) * tl.exp2(row_decays(entries.totals, entry, a * TK, K, TK))
            for s in tl.static_range(COUNT):
                transition_TT = load_block(transition, a * TK, s * TK, K, K, TK, TK)
                path_TV = tl.dot(transition_TT, path[s], path_TV, input_precision=MATH.precision)
            store_block(target, a * TK, column, path_TV, K, K, TK, BV)
            new = new + (path_TV.to(MATH.dot),)
        path = new
        log_decay += column_decays(entries.totals, entry, column, K, BV)
        store_total(past.prefix_totals, ends, entry + H, end, is_end, log_decay, column, K, BV)


@launcher
@triton.jit(do_not_specialize=SIZES)
def run_scan_kernel(
    entries,
    past,
    ends,
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
    """One run, one head, BV columns of states or of transitions: the past of its entries; and, where the runs are
    entries of a next tier, `ends`, the run as one of them."""
    tier = TierSizes(H, per_row, cap, num_slots, columns, collapsed, first_block, places)
    VALUES: tl.constexpr = (V + BV - 1) // BV
    KEYS: tl.constexpr = (K + BV - 1) // BV
    tile, h, number = head_program(VALUES + KEYS, tier.H)
    run = locate_entries(number, table, tier.per_row, TREE)
    if tile < VALUES:
        scan_states(entries, past, ends, run, h, tile * BV, tier, K, V, TK, BV, TREE, MATH)
    else:
        scan_transitions(entries, past, ends, run, h, (tile - VALUES) * BV, tier, K, TK, BV, TREE, MATH)


def run_scan(x: Inputs, tier: Tier, entries: Entries) -> tuple[Past, Entries | None]:
    """The past of a tier's entries inside their runs, and the runs as the entries of the next tier."""
    H, K, V = x.heads, x.key_dim, x.value_dim
    past = Past(
        kept=x.empty(tier.entries, tier.slots, H, K, V, dtype=x.dtype),
        prefixes=torch.empty_like(entries.transitions),
        prefix_totals=entries.totals.empty_like(tier.entries),
        carried=x.empty(0, dtype=x.dtype),
        initial=x.initial,
    )
    ends = None
    if tier is not x.layout.tiers[-1]:
        transitions, states = (x.empty(tier.runs, H, K, width, dtype=x.dtype) for width in (K, V))
        ends = Entries(transitions, entries.totals.empty_like(tier.runs), states)
    run_scan_kernel[(tier.runs * H * x.tiling.column_tiles("run_scan"),)](
        entries, past, ends or NO_ENDS, tier.table, *x.tier_sizes(tier), TREE=x.tree, **x.constants("run_scan")
    )
    return past, ends
