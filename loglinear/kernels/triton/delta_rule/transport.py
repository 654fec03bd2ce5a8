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

from loglinear.kernels.triton.delta_rule.chunk_state import chunk_blocks
from loglinear.kernels.triton.delta_rule.tiles import (
    RUN,
    SIZES,
    count_bits,
    locate_entries,
    slot_of_next,
    slots_read,
)
from loglinear.kernels.triton.tiles import head_program, load_block, locate, store_block
from loglinear.kernels.triton.walks import nearest


@triton.jit
def last_step(stop, ENDS: tl.constexpr):
    """Behind the last entry that is to be multiplied with: a whole run has an end, if there is a next storey."""
    if ENDS:
        return tl.where(stop == RUN, stop, stop - 1)
    else:
        return stop - 1


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
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + P times the sum of the members, one [TK, BV] tile."""
    for s in range(0, K, TK):
        sum_TV = sum_of_slots(states, members, s, column, H, K, V, TK, BV)
        total += tl.where(s == row, decay, 0.0) * sum_TV
        transition_TT = load_block(transition, row, s, K, K, TK, TK)
        total = tl.dot(transition_TT, sum_TV.to(transition_TT.dtype), total, input_precision=PRECISION)
    return total


@triton.jit
def first_states(
    nodes, kept, slots, first_level, cap, sequence, h, H,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What a continued sequence's first entry reads: its slots' nodes. The prefix is carried."""
    for _ in range(count_bits(slots)):
        j = nearest(slots)
        slots &= slots - 1
        node = nodes + ((sequence.to(tl.int64) * (cap + 1) + tl.minimum(first_level + j, cap)) * H + h) * (K * V)
        is_block = (first_level + j < cap).to(tl.float32)
        for a in range(0, K, TK):
            for column in range(0, V, BV):
                state_TV = load_block(node, a, column, K, V, TK, BV) * is_block
                store_block(kept + j.to(tl.int64) * H * (K * V), a, column, state_TV, K, V, TK, BV)


@triton.jit
def next_states(
    transition, decay, state, kept, next_kept, next_state, merged, others, H,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the next entry reads, next_kept, from what this one does: next_state of the merged, and of each other."""
    for column in range(0, V, BV):
        for a in range(0, K, TK):
            state_TV = load_block(state, a, column, K, V, TK, BV).to(tl.float32)
            if merged > 0:
                state_TV = add_moved(state_TV, kept, merged, transition, decay, a, column, H, K, V, TK, BV, PRECISION)
            store_block(next_state, a, column, state_TV, K, V, TK, BV)
    for _ in range(count_bits(others)):
        j = nearest(others)
        others &= others - 1
        for column in range(0, V, BV):
            for a in range(0, K, TK):
                state_TV = add_moved(
                    tl.zeros([TK, BV], tl.float32), kept, 1 << j, transition, decay, a, column, H,
                    K, V, TK, BV, PRECISION,
                )  # fmt: skip
                store_block(next_kept + j.to(tl.int64) * H * (K * V), a, column, state_TV, K, V, TK, BV)


@triton.jit
def next_prefix(
    transition, decay, prefix, log_decay, is_first, target, H,
    K: tl.constexpr, TK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """D of P F, with P = g I + D and F = f I + E:  g E + f D + D E."""
    one = tl.full([], 1, tl.int32)
    for column in range(0, K, TK):
        for a in range(0, K, TK):
            path_TT = load_block(transition, a, column, K, K, TK, TK) * tl.exp2(log_decay)
            if not is_first:
                path_TT = add_moved(path_TT, prefix, one, transition, decay, a, column, H, K, K, TK, TK, PRECISION)
            store_block(target, a, column, path_TT, K, K, TK, TK)


@triton.jit(do_not_specialize=SIZES)
def transport_kernel(
    k, v, beta, inverse, cumulative, chunk_table, transitions, totals, states, nodes, kept, prefixes, prefix_totals,
    ends, end_transitions, end_totals, table,
    T, per_row, H, R, cap, num_slots, first_level,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    CHUNKS: tl.constexpr, ENDS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One run, one head. Of its entries, transitions [entry, H, K, K], log2 of their decays, totals [entry, H], and
    states [entry, H, K, V] (with CHUNKS made here): where they are read kept [entry, slot, H, K, V], and prefixes
    [entry, H, K, K] with prefix_totals [entry, H]. The run itself is an entry of the next storey: ends, end_*."""
    _, h, run = head_program(1, H)
    base, start, stop, number, sequence = locate_entries(run, table, per_row, PACKED)
    if NODES:
        reads = tl.where(start < stop, slots_read(start, num_slots), 0)
        first_states(
            nodes, kept + ((base + start) * num_slots * H + h) * (K * V), reads, first_level, cap, sequence, h, H,
            K, V, TK, BV,
        )  # fmt: skip
    log_decay = tl.zeros([], tl.float32)  # from the run's start
    for i in range(start, last_step(stop, ENDS)):
        row = base + i
        entry, next_entry = row * H + h, (row + 1) * H + h
        transition, state = transitions + entry * (K * K), states + entry * (K * V)
        t, reads = slot_of_next(i, num_slots), slots_read(i, num_slots)
        merged = reads & ((2 << t) - 1)
        next_kept = kept + ((row + 1) * num_slots * H + h) * (K * V)
        next_state, next_path = next_kept + t.to(tl.int64) * H * (K * V), prefixes + next_entry * (K * K)
        next_total = prefix_totals + next_entry
        if ENDS:
            end = run.to(tl.int64) * H + h
            next_state = tl.where(i == RUN - 1, ends + end * (K * V), next_state)
            next_path = tl.where(i == RUN - 1, end_transitions + end * (K * K), next_path)
            next_total = tl.where(i == RUN - 1, end_totals + end, next_total)
        if CHUNKS:
            b, first, end_, z, z0, sequence_ = locate(row, chunk_table, T, per_row, C, PACKED)
            chunk_blocks(
                k + b * k_b + first * k_t + (h // R) * k_h, v + b * v_b + first * v_t + h * v_h,
                beta + b * beta_b + first * beta_t + h * beta_h, inverse + entry * (C * C), cumulative + entry * C,
                transition, state, k_t, v_t, beta_t,
                K, V, C, TK, BV, DOT, PRECISION,
            )  # fmt: skip
        total = tl.load(totals + entry)
        tl.debug_barrier()  # what this program wrote is seen
        next_states(
            transition, tl.exp2(total), state, kept + (row * num_slots * H + h) * (K * V), next_kept, next_state,
            merged, reads - merged, H,
            K, V, TK, BV, PRECISION,
        )  # fmt: skip
        next_prefix(
            transition, tl.exp2(total), prefixes + entry * (K * K), log_decay, i == start, next_path, H,
            K, TK, PRECISION,
        )  # fmt: skip
        log_decay += total
        tl.store(next_total, log_decay)
