"""The past inside a run, differentiated: from each entry's reads back to the entries themselves.

    Y_{i+1}[t] = P_i sum(Y_i[j], j <= t) + S_i:   dS_i = dY_{i+1}[t],   dY_i[j] += P_i^T dY_{i+1}[t]
    Y_{i+1}[j] = P_i Y_i[j],  j > t:              dY_i[j] += P_i^T dY_{i+1}[j]
    F_{i+1} = P_i F_i:                            dF_i += P_i^T dF_{i+1}

and then, every entry by itself, dP_i = sum(dY_{i+1} (what P_i was multiplied with)^T) + dF_{i+1} F_i^T.
"""

# H heads, K key, V value, i number of an entry in its run, j slot
import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.delta_rule.carry_in_backward import moved_back
from loglinear.kernels.triton.delta_rule.reads import (
    count_moves,
    count_reads,
    first_move,
    first_slot,
    slots_read,
    step_of,
)
from loglinear.kernels.triton.delta_rule.run_scan import sum_of_slots
from loglinear.kernels.triton.delta_rule.states import (
    SIZES,
    EntryGradients,
    Inputs,
    PastGradients,
    TierSizes,
    TierStates,
)
from loglinear.kernels.triton.delta_rule.tiles import column_decays, locate_entries, row_decays
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.tiles import head_program, load_block, store_block
from loglinear.kernels.triton.walks import after, block_row


@triton.jit
def add_moved_back(
    entries,
    entry,
    dstate,
    has_next,
    members,
    dreads,
    dkept,
    column,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """dkept = dreads + P^T dstate of the members, which all moved into dstate's block; P of the entry in this row."""
    for a in range(0, K, TK):
        moved_TV = tl.zeros([TK, BV], tl.float32)
        if has_next:
            moved_TV = moved_back(entries.transitions, entries.totals, entry, dstate, a, column, K, V, TK, BV, MATH)
        remaining = members
        for _ in range(count_reads(members, TREE)):
            place = first_slot(remaining, TREE).to(tl.int64) * H * (K * V)
            remaining = after(remaining, TREE)
            total_TV = moved_TV + load_block(dreads + place, a, column, K, V, TK, BV).to(tl.float32)
            store_block(dkept + place, a, column, total_TV, K, V, TK, BV)


@triton.jit
def store_initial_gradients(
    dkept,
    dinitial,
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
    """The adjoint of `store_initial`, one tile of V. The prefix has its gradient from the last tier's dR."""
    SIZE: tl.constexpr = K * V
    reads = tl.where(run.start < run.stop, slots_read(run.start, tier.num_slots, TREE), 0)
    tl.debug_barrier()
    for _ in range(count_reads(reads, TREE)):
        j = first_slot(reads, TREE)
        reads = after(reads, TREE)
        m = tier.first_block + j
        if m < tier.cap:
            block = dinitial + block_row(run.sequence, m, tier, h) * SIZE
            source = dkept + (((run.base + run.start) * tier.num_slots + j) * tier.H + h) * SIZE
            for a in range(0, K, TK):
                store_block(block, a, column, load_block(source, a, column, K, V, TK, BV), K, V, TK, BV)


@triton.jit
def scan_states_backward(
    entries,
    dreads,
    dkept,
    dends,
    dentries,
    dinitial,
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
    """One tile of V."""
    SIZE: tl.constexpr = K * V
    H, num_slots = tier.H, tier.num_slots
    for step in range(run.stop - run.start):
        i = run.stop - 1 - step
        row = run.base + i
        entry = row * H + h
        t, merged, moved = step_of(i, num_slots, TREE)
        next_kept, has_next = dkept + ((row + 1) * num_slots * H + h) * SIZE, i + 1 < run.stop
        dstate = next_kept + t.to(tl.int64) * H * SIZE
        if dends is not None:
            dstate = tl.where(i == (1 << TREE.tier) - 1, dends.states + (run.row.to(tl.int64) * H + h) * SIZE, dstate)
            has_next = has_next | run.has_end
        dreads_here, dkept_here = dreads + (row * tier.places * H + h) * SIZE, dkept + (row * num_slots * H + h) * SIZE
        tl.debug_barrier()  # what this program wrote for entry i + 1 is seen
        for a in range(0, K, TK):
            own_TV = tl.zeros([TK, BV], tl.float32)
            if has_next:
                own_TV += load_block(dstate, a, column, K, V, TK, BV).to(tl.float32)
            store_block(dentries.states + entry * SIZE, a, column, own_TV, K, V, TK, BV)
        if merged > 0:
            add_moved_back(
                entries, entry, dstate, has_next, merged, dreads_here, dkept_here, column, H, K, V, TK, BV, TREE, MATH
            )
        for _ in range(count_moves(moved, num_slots, TREE)):
            members, j, moved = first_move(moved, num_slots, TREE)
            dstate = next_kept + j.to(tl.int64) * H * SIZE
            add_moved_back(
                entries, entry, dstate, has_next, members, dreads_here, dkept_here, column, H, K, V, TK, BV, TREE, MATH
            )
    if dinitial is not None:
        store_initial_gradients(dkept, dinitial, run, h, column, tier, K, V, TK, BV, TREE)


@triton.jit
def scan_transitions_backward(
    entries,
    dprefixes,
    dends,
    run,
    h,
    column,
    H,
    K: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    MATH: tl.constexpr,
):
    """One tile of columns, kept in registers."""
    SIZE: tl.constexpr = K * K
    COUNT: tl.constexpr = (K + TK - 1) // TK
    path = ()
    for a in tl.static_range(COUNT):
        end_TV = tl.zeros([TK, BV], MATH.dot)
        if dends is not None:
            dend = dends.transitions + (run.row.to(tl.int64) * H + h) * SIZE
            end_TV = load_block(dend, a * TK, column, K, K, TK, BV)
            end_TV = tl.where(run.has_end, end_TV, 0.0).to(MATH.dot)
        path = path + (end_TV,)
    for step in range(run.stop - run.start - 1):
        entry = (run.base + run.stop - 1 - step) * H + h
        is_made = (step > 0) | run.has_end  # the sequence's last entry may have no transition, and path is 0
        transition = entries.transitions + entry * SIZE
        new = ()
        for a in tl.static_range(COUNT):
            path_TV = load_block(dprefixes + entry * SIZE, a * TK, column, K, K, TK, BV).to(tl.float32)
            decay = tl.exp2(row_decays(entries.totals, entry, a * TK, K, TK))
            path_TV += path[a].to(tl.float32) * tl.where(is_made, decay, 0.0)
            for s in tl.static_range(COUNT):
                transition_TT = load_block(transition, s * TK, a * TK, K, K, TK, TK)
                transition_TT = tl.where(is_made, transition_TT, 0.0).to(MATH.dot)
                path_TV = tl.dot(tl.trans(transition_TT), path[s], path_TV, input_precision=MATH.precision)
            store_block(dprefixes + entry * SIZE, a * TK, column, path_TV, K, K, TK, BV)
            new = new + (path_TV.to(MATH.dot),)
        path = new


@launcher
@triton.jit(do_not_specialize=SIZES)
def run_scan_backward_kernel(
    entries,
    dreads,
    dpast,
    dends,
    dentries,
    dinitial,
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
    """One run, one head, BV columns of states or of transitions. dreads [entry, place, H, K, V], the reads' own
    gradients, of which the first places are the slots', become dY (which may be the same array) and the entries' dS; dF
    changes in place, but for a run's first entry. dends are the next tier's entries."""
    tier = TierSizes(H, per_row, cap, num_slots, columns, collapsed, first_block, places)
    VALUES: tl.constexpr = (V + BV - 1) // BV
    KEYS: tl.constexpr = (K + BV - 1) // BV
    tile, h, number = head_program(VALUES + KEYS, tier.H)
    run = locate_entries(number, table, tier.per_row, TREE)
    if tile < VALUES:
        scan_states_backward(
            entries, dreads, dpast.kept, dends, dentries, dinitial, run, h, tile * BV, tier, K, V, TK, BV, TREE, MATH
        )
    else:
        column = (tile - VALUES) * BV
        scan_transitions_backward(entries, dpast.prefixes, dends, run, h, column, tier.H, K, TK, BV, MATH)


@launcher
@triton.jit(do_not_specialize=SIZES)
def transition_backward_kernel(
    past,
    dpast,
    dends,
    dentries,
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
    """One entry of a run, one head, one [TK, TK] tile: dP, 0 of the last one."""
    tier = TierSizes(H, per_row, cap, num_slots, columns, collapsed, first_block, places)
    RUN: tl.constexpr = 1 << TREE.tier
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile, h, part = head_program(TILES * TILES, tier.H)
    i = part % RUN
    run = locate_entries(part // RUN, table, tier.per_row, TREE)
    if (i < run.start) | (i >= run.stop):
        return
    a, column = tile // TILES * TK, tile % TILES * TK
    row = run.base + i
    entry, end = row * H + h, run.row.to(tl.int64) * H + h
    total = tl.zeros([TK, TK], tl.float32)
    t, merged, moved = step_of(i, num_slots, TREE)
    kept_here = past.kept + (row * num_slots * H + h) * (K * V)
    next_kept, has_next = dpast.kept + ((row + 1) * num_slots * H + h) * (K * V), i + 1 < run.stop
    dstate, dprefix = next_kept + t.to(tl.int64) * H * (K * V), dpast.prefixes + (entry + H) * (K * K)
    if dends is not None:
        dstate = tl.where(i == (1 << TREE.tier) - 1, dends.states + end * (K * V), dstate)
        dprefix = tl.where(i == (1 << TREE.tier) - 1, dends.transitions + end * (K * K), dprefix)
        has_next = has_next | run.has_end
    if has_next:
        for _ in range(count_moves(moved, num_slots, TREE) + (merged > 0).to(tl.int32)):
            members, j, others = first_move(moved, num_slots, TREE)
            members = tl.where(merged > 0, merged, members)
            source = tl.where(merged > 0, dstate, next_kept + j.to(tl.int64) * H * (K * V))
            moved = tl.where(merged > 0, moved, others)
            merged = merged - merged
            for x in range(0, V, BV):
                dstate_TV = load_block(source, a, x, K, V, TK, BV).to(MATH.dot)
                sum_TV = sum_of_slots(kept_here, members, column, x, H, K, V, TK, BV, TREE)
                total = tl.dot(dstate_TV, tl.trans(sum_TV.to(MATH.dot)), total, input_precision=MATH.precision)
        log_decay = column_decays(past.prefix_totals, entry, column, K, TK, i > run.start)
        total += load_block(dprefix, a, column, K, K, TK, TK).to(tl.float32) * tl.exp2(log_decay)
        if i > run.start:
            for s in range(0, K, TK):
                dprefix_TT = load_block(dprefix, a, s, K, K, TK, TK)
                prefix_TT = load_block(past.prefixes + entry * (K * K), column, s, K, K, TK, TK)
                total = tl.dot(dprefix_TT, tl.trans(prefix_TT), total, input_precision=MATH.precision)
    store_block(dentries.transitions + entry * (K * K), a, column, total, K, K, TK, TK)


def run_scan_backward(
    x: Inputs,
    states: TierStates,
    dreads: Tensor,
    dpast: PastGradients,
    dends: EntryGradients | None,
    dinitial: Tensor | None,
) -> EntryGradients:
    """The gradients of a tier's entries, from those of their reads and of the next tier's entries; and, written, those
    of the initial blocks that the tier reads."""
    tier, entries, past = states
    H, dstates = x.heads, x.empty(tier.entries, x.heads, x.key_dim, x.value_dim, dtype=x.dtype)
    dentries = EntryGradients(dstates, torch.empty_like(entries.transitions))
    sizes = (tier.table, *x.tier_sizes(tier, dreads.shape[1]))
    run_scan_backward_kernel[(tier.runs * H * x.tiling.column_tiles("run_scan_backward"),)](
        entries, dreads, dpast, dends, dentries, dinitial, *sizes, TREE=x.tree, **x.constants("run_scan_backward")
    )
    transition_backward_kernel[((tier.runs << x.tree.tier) * H * x.tiling.square_tiles("transition_backward"),)](
        past, dpast, dends, dentries, *sizes, TREE=x.tree, **x.constants("transition_backward")
    )
    return dentries
