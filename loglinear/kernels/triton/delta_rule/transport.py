"""What is older inside a run, brought to the start of each of its entries.

Entry i of a run reads one state for each bit of i, the block of as many entries before it (those from the last slot on
in one), and what is older than the run through the transition from its start. With P_i = exp(Gam_i) I + D_i and S_i of
the entries themselves, and Y_i what entry i reads,

    Y_{i+1}[t] = P_i sum(Y_i[j], j <= t) + S_i,  t = ctz(i + 1)      entry i, with the blocks that it merges with
    Y_{i+1}[j] = P_i Y_i[j],  j > t
    F_{i+1} = P_i F_i                                               from the run's start

which behind the last entry is the run as one entry of the next storey. Transported states are read by one entry each:
their gradients need no gathering, and what keys that come again have erased of them is no longer in them to be rounded.
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
from loglinear.kernels.triton.tiles import head_program, load_block, store_block
from loglinear.kernels.triton.walks import nearest


@triton.jit
def sum_of_slots(states, members, row, column, H,
                 K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """A [TK, BV] tile of the sum of an entry's states [slot, H, K, V] that are members, given as bits."""
    total = tl.zeros([TK, BV], tl.float32)
    for _ in range(count_bits(members)):
        total += load_block(states + nearest(members).to(tl.int64) * H * (K * V), row, column, K, V, TK, BV)
        members &= members - 1
    return total


@triton.jit
def add_moved(
    total, states, members, transition, decay, row, column, H,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """total + P times the sum of the members, one [TK, BV] tile."""
    for s in range(0, K, TK):
        sum_TV = sum_of_slots(states, members, s, column, H, K, V, TK, BV)
        total += tl.where(s == row, decay, 0.0) * sum_TV
        transition_TT = load_block(transition, row, s, K, K, TK, TK)
        total = tl.dot(transition_TT, sum_TV.to(transition_TT.dtype), total, input_precision=MATH.precision)
    return total


@triton.jit
def transport_states(
    transitions, totals, states, nodes, kept, ends,
    base, start, stop, has_end, run, sequence, h, column, H, cap, num_slots, first_level,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    ENDS: tl.constexpr, MATH: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One tile of V: kept, and the run's S, ends [run, H, K, V]. A continued sequence begins with nodes."""
    SIZE: tl.constexpr = K * V
    if NODES:
        reads = tl.where(start < stop, slots_read(start, num_slots), 0)
        for _ in range(count_bits(reads)):
            j = nearest(reads)
            reads &= reads - 1
            node = nodes + ((sequence.to(tl.int64) * (cap + 1) + tl.minimum(first_level + j, cap)) * H + h) * SIZE
            # The prefix is carried.
            is_block = (first_level + j < cap).to(tl.float32)
            for a in range(0, K, TK):
                state_TV = load_block(node, a, column, K, V, TK, BV) * is_block
                store_block(kept + (((base + start) * num_slots + j) * H + h) * SIZE, a, column, state_TV, K, V, TK, BV)
    for i in range(start, stop - 1 + has_end.to(tl.int32)):
        row = base + i
        entry, kept_here = row * H + h, kept + (row * num_slots * H + h) * SIZE
        decay = tl.exp2(tl.load(totals + entry))
        t, reads = slot_of_next(i, num_slots), slots_read(i, num_slots)
        merged = reads & ((2 << t) - 1)
        reads -= merged
        target = kept + (((row + 1) * num_slots + t) * H + h) * SIZE
        if ENDS:
            target = tl.where(i == RUN - 1, ends + (run.to(tl.int64) * H + h) * SIZE, target)
        tl.debug_barrier()  # what this program wrote for entry i is seen
        for a in range(0, K, TK):
            state_TV = load_block(states + entry * SIZE, a, column, K, V, TK, BV).to(tl.float32)
            if merged > 0:
                state_TV = add_moved(
                    state_TV, kept_here, merged, transitions + entry * (K * K), decay, a, column, H,
                    K, V, TK, BV, MATH,
                )  # fmt: skip
            store_block(target, a, column, state_TV, K, V, TK, BV)
        for _ in range(count_bits(reads)):
            j = nearest(reads)
            reads &= reads - 1
            target = kept + (((row + 1) * num_slots + j) * H + h) * SIZE
            for a in range(0, K, TK):
                state_TV = add_moved(
                    tl.zeros([TK, BV], tl.float32), kept_here, 1 << j, transitions + entry * (K * K), decay, a, column,
                    H, K, V, TK, BV, MATH,
                )  # fmt: skip
                store_block(target, a, column, state_TV, K, V, TK, BV)


@triton.jit
def transport_transitions(
    transitions, totals, prefixes, prefix_totals, ends, end_totals,
    base, start, stop, has_end, run, h, column, H,
    K: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, ENDS: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """One tile of columns of F, kept in registers: prefixes and prefix_totals, and the run's P, ends and end_totals.
    With P = g I + D, F = f I + E:  P F = g f I + g E + D E + f D."""
    SIZE: tl.constexpr = K * K
    COUNT: tl.constexpr = (K + TK - 1) // TK
    log_decay, path = tl.zeros([], tl.float32), ()
    for _ in tl.static_range(COUNT):
        path = path + (tl.zeros([TK, BV], MATH.dot),)
    for i in range(start, stop - 1 + has_end.to(tl.int32)):
        entry = (base + i) * H + h
        transition, total = transitions + entry * SIZE, tl.load(totals + entry)
        target, target_total = prefixes + (entry + H) * SIZE, prefix_totals + entry + H
        if ENDS:
            end = run.to(tl.int64) * H + h
            target = tl.where(i == RUN - 1, ends + end * SIZE, target)
            target_total = tl.where(i == RUN - 1, end_totals + end, target_total)
        new = ()
        for a in tl.static_range(COUNT):
            path_TV = load_block(transition, a * TK, column, K, K, TK, BV).to(tl.float32) * tl.exp2(log_decay)
            path_TV += path[a].to(tl.float32) * tl.exp2(total)
            for s in tl.static_range(COUNT):
                transition_TT = load_block(transition, a * TK, s * TK, K, K, TK, TK)
                path_TV = tl.dot(transition_TT, path[s], path_TV, input_precision=MATH.precision)
            store_block(target, a * TK, column, path_TV, K, K, TK, BV)
            new = new + (path_TV.to(MATH.dot),)
        path = new
        log_decay += total
        tl.store(target_total, log_decay)


@triton.jit(do_not_specialize=SIZES)
def transport_kernel(
    transitions, totals, states, nodes, kept, prefixes, prefix_totals, ends, end_transitions, end_totals, table,
    per_row, H, cap, num_slots, first_level,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    ENDS: tl.constexpr, MATH: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One run, one head, BV columns of states or of transitions. Where they are read: kept [entry, slot, H, K, V];
    prefixes, D of F from each run's second entry on [entry, H, K, K], and log2 of its decay, prefix_totals [entry, H];
    and the runs as entries."""
    VALUES: tl.constexpr = (V + BV - 1) // BV
    KEYS: tl.constexpr = (K + BV - 1) // BV
    tile, h, run = head_program(VALUES + KEYS, H)
    base, start, stop, number, sequence, has_end = locate_entries(run, table, per_row, PACKED)
    if tile < VALUES:
        transport_states(
            transitions, totals, states, nodes, kept, ends,
            base, start, stop, has_end, run, sequence, h, tile * BV, H, cap, num_slots, first_level,
            K, V, TK, BV, ENDS, MATH, NODES,
        )  # fmt: skip
    else:
        transport_transitions(
            transitions, totals, prefixes, prefix_totals, end_transitions, end_totals,
            base, start, stop, has_end, run, h, (tile - VALUES) * BV, H,
            K, TK, BV, ENDS, MATH,
        )  # fmt: skip
