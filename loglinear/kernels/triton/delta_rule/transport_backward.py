"""What is older inside a run, differentiated: from each entry's reads back to the entries themselves.

    Y_{i+1}[t] = P_i sum(Y_i[j], j <= t) + S_i:   dS_i = dY_{i+1}[t],   dY_i[j] += P_i^T dY_{i+1}[t]
    Y_{i+1}[j] = P_i Y_i[j],  j > t:              dY_i[j] += P_i^T dY_{i+1}[j]
    F_{i+1} = P_i F_i:                            dF_i += P_i^T dF_{i+1}

and then, every entry by itself, dP_i = sum(dY_{i+1} (what P_i was multiplied with)^T) + dF_{i+1} F_i^T.
"""

# H heads, K key, V value, i number of an entry in its run, j slot
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import (
    RUN,
    SIZES,
    count_bits,
    locate_entries,
    slot_of_next,
    slots_read,
)
from loglinear.kernels.triton.delta_rule.transport import (
    SLOTS,
    add_tiles,
    choose,
    load_column,
    part,
    store_column,
    zero_tiles,
)
from loglinear.kernels.triton.tiles import head_program, load_block, store_block
from loglinear.kernels.triton.walks import nearest


@triton.jit
def moved_back(transition, decay, tiles, K: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """P^T times a column of tiles."""
    new = ()
    for a in tl.static_range((K + TK - 1) // TK):
        total_TV = tiles[a].to(tl.float32) * decay
        for s in tl.static_range((K + TK - 1) // TK):
            transition_TT = load_block(transition, s * TK, a * TK, K, K, TK, TK)
            total_TV = tl.dot(tl.trans(transition_TT), tiles[s].to(DOT), total_TV, input_precision=PRECISION)
        new = new + (total_TV,)
    return new


@triton.jit(do_not_specialize=SIZES)
def transport_states_backward_kernel(
    transitions, totals, dreads, dkept, dends, dstates, dnodes, table,
    per_row, H, cap, num_slots, first_level, places,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    ENDS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One run, one head, one tile of V. dreads [entry, place, H, K, V], the reads' own gradients, of which the first
    places are the slots', become dkept [entry, slot, H, K, V] (which may be the same), and dstates [entry, H, K, V];
    dends [run, H, K, V] are the next storey's."""
    SIZE: tl.constexpr = K * V
    TILES: tl.constexpr = (V + BV - 1) // BV
    COUNT: tl.constexpr = (K + TK - 1) // TK
    tile, h, run = head_program(TILES, H)
    base, start, stop, number, sequence = locate_entries(run, table, per_row, PACKED)
    column = tile * BV
    end = zero_tiles(COUNT, TK, BV, DOT)
    if ENDS:
        if stop == RUN:
            end = choose(True, load_column(dends + (run.to(tl.int64) * H + h) * SIZE, column, K, V, TK, BV), end)
    held = ()  # the gradient of what the next entry reads
    for j in tl.static_range(SLOTS):
        held = held + end
    for step in range(stop - start):
        i = stop - 1 - step
        row = base + i
        entry = row * H + h
        transition, decay = transitions + entry * (K * K), tl.exp2(tl.load(totals + entry))
        t, reads = slot_of_next(i, num_slots), slots_read(i, num_slots)
        own = choose(t == 0, part(held, 0, COUNT), part(held, 1, COUNT))
        own = choose(t == 2, part(held, 2, COUNT), own)
        store_column(dstates + entry * SIZE, own, column, K, V, TK, BV)
        merged = zero_tiles(COUNT, TK, BV, tl.float32)
        if reads & ((2 << t) - 1) > 0:
            merged = moved_back(transition, decay, own, K, TK, DOT, PRECISION)
        earlier = ()
        for j in tl.static_range(SLOTS):
            state = part(held, j, COUNT)
            if (reads >> j) & 1 > 0:
                total = merged
                if j > t:
                    total = moved_back(transition, decay, state, K, TK, DOT, PRECISION)
                dread = load_column(dreads + ((row * places + j) * H + h) * SIZE, column, K, V, TK, BV)
                state = add_tiles(total, dread, DOT)
                store_column(dkept + ((row * num_slots + j) * H + h) * SIZE, state, column, K, V, TK, BV)
            earlier = earlier + state
        held = earlier
    if NODES:
        for j in tl.static_range(SLOTS):
            if ((slots_read(start, num_slots) >> j) & 1 > 0) & (start < stop) & (first_level + j < cap):
                node = (sequence.to(tl.int64) * (cap + 1) + first_level + j) * H + h
                store_column(dnodes + node * SIZE, part(held, j, COUNT), column, K, V, TK, BV)


@triton.jit(do_not_specialize=SIZES)
def transport_prefixes_backward_kernel(
    transitions, totals, dprefixes, dends, table,
    per_row, H,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    ENDS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One run, one head, one tile of columns (V is K): dprefixes [entry, H, K, K] in place, for all entries but the
    first; dends [run, H, K, K] are the next storey's."""
    SIZE: tl.constexpr = K * K
    TILES: tl.constexpr = (V + BV - 1) // BV
    COUNT: tl.constexpr = (K + TK - 1) // TK
    tile, h, run = head_program(TILES, H)
    base, start, stop, number, sequence = locate_entries(run, table, per_row, PACKED)
    column = tile * BV
    path = zero_tiles(COUNT, TK, BV, DOT)
    if ENDS:
        if stop == RUN:
            path = choose(True, load_column(dends + (run.to(tl.int64) * H + h) * SIZE, column, K, K, TK, BV), path)
    for step in range(stop - start - 1):
        entry = (base + stop - 1 - step) * H + h
        own = load_column(dprefixes + entry * SIZE, column, K, K, TK, BV)
        decay = tl.exp2(tl.load(totals + entry))
        path = add_tiles(moved_back(transitions + entry * SIZE, decay, path, K, TK, DOT, PRECISION), own, DOT)
        store_column(dprefixes + entry * SIZE, path, column, K, K, TK, BV)


@triton.jit
def sum_of_slots(states, members, row, column, H,
                 K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """A [TK, BV] tile of the sum of an entry's states [slot, H, K, V] that are members, given as bits."""
    total = tl.zeros([TK, BV], tl.float32)
    for _ in range(count_bits(members)):
        total += load_block(states + nearest(members).to(tl.int64) * H * (K * V), row, column, K, V, TK, BV)
        members &= members - 1
    return total


@triton.jit(do_not_specialize=SIZES)
def transition_backward_kernel(
    kept, prefixes, prefix_totals, dkept, dends, dprefixes, dend_transitions, dtransitions, table,
    per_row, H, num_slots,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    ENDS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One entry of a run, one head, one [TK, TK] tile: dtransitions [entry, H, K, K], 0 of the last one."""
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile, h, part = head_program(TILES * TILES, H)
    i, run = part % RUN, part // RUN
    base, start, stop, number, sequence = locate_entries(run, table, per_row, PACKED)
    if (i < start) | (i >= stop):
        return
    a, column = tile // TILES * TK, tile % TILES * TK
    row = base + i
    entry, end = row * H + h, run.to(tl.int64) * H + h
    total = tl.zeros([TK, TK], tl.float32)
    t, reads = slot_of_next(i, num_slots), slots_read(i, num_slots)
    merged = reads & ((2 << t) - 1)
    later = reads - merged
    next_kept, has_next = dkept + ((row + 1) * num_slots * H + h) * (K * V), i + 1 < stop
    dstate, dprefix = next_kept + t.to(tl.int64) * H * (K * V), dprefixes + (entry + H) * (K * K)
    if ENDS:
        dstate = tl.where(i == RUN - 1, dends + end * (K * V), dstate)
        dprefix = tl.where(i == RUN - 1, dend_transitions + end * (K * K), dprefix)
        has_next = has_next | (i == RUN - 1)
    if has_next:
        for _ in range(count_bits(later) + (merged > 0).to(tl.int32)):
            members = tl.where(merged > 0, merged, later & -later)
            source = tl.where(merged > 0, dstate, next_kept + nearest(later).to(tl.int64) * H * (K * V))
            later = tl.where(merged > 0, later, later & (later - 1))
            merged = merged - merged
            for x in range(0, V, BV):
                dstate_TV = load_block(source, a, x, K, V, TK, BV).to(DOT)
                sum_TV = sum_of_slots(kept + (row * num_slots * H + h) * (K * V), members, column, x, H, K, V, TK, BV)
                total = tl.dot(dstate_TV, tl.trans(sum_TV.to(DOT)), total, input_precision=PRECISION)
        log_decay = tl.load(prefix_totals + entry, mask=i > start, other=0.0)
        total += load_block(dprefix, a, column, K, K, TK, TK).to(tl.float32) * tl.exp2(log_decay)
        if i > start:
            for s in range(0, K, TK):
                dprefix_TT = load_block(dprefix, a, s, K, K, TK, TK)
                prefix_TT = load_block(prefixes + entry * (K * K), column, s, K, K, TK, TK)
                total = tl.dot(dprefix_TT, tl.trans(prefix_TT), total, input_precision=PRECISION)
    store_block(dtransitions + entry * (K * K), a, column, total, K, K, TK, TK)
