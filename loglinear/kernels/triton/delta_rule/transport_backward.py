"""What is older inside a run, differentiated: from each entry's reads back to the entries themselves.

    Y_{i+1}[t] = P_i sum(Y_i[j], j <= t) + S_i:   dS_i = dY_{i+1}[t],   dY_i[j] += P_i^T dY_{i+1}[t]
    Y_{i+1}[j] = P_i Y_i[j],  j > t:              dY_i[j] += P_i^T dY_{i+1}[j]
    F_{i+1} = P_i F_i:                            dF_i += P_i^T dF_{i+1}

and then, every entry by itself, dP_i = sum(dY_{i+1} (what P_i was multiplied with)^T) + dF_{i+1} F_i^T.
"""

# H heads, K key, V value, i number of an entry in its run, j slot
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.carry_backward import moved_back
from loglinear.kernels.triton.delta_rule.tiles import (
    RUN,
    SIZES,
    count_bits,
    locate_entries,
    slot_of_next,
    slots_read,
)
from loglinear.kernels.triton.delta_rule.transport import sum_of_slots
from loglinear.kernels.triton.tiles import head_program, load_block, store_block
from loglinear.kernels.triton.walks import nearest


@triton.jit
def add_moved_back(
    transition, decay, dstate, has_next, members, dreads, dkept, column, H,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """dkept = dreads + P^T dstate of the members, given as bits, which all moved into dstate's block."""
    for a in range(0, K, TK):
        moved_TV = tl.zeros([TK, BV], tl.float32)
        if has_next:
            moved_TV = moved_back(transition, decay, dstate, a, column, K, V, TK, BV, MATH)
        remaining = members
        for _ in range(count_bits(members)):
            place = nearest(remaining).to(tl.int64) * H * (K * V)
            remaining &= remaining - 1
            total_TV = moved_TV + load_block(dreads + place, a, column, K, V, TK, BV).to(tl.float32)
            store_block(dkept + place, a, column, total_TV, K, V, TK, BV)


@triton.jit
def transport_states_backward(
    transitions, totals, dreads, dkept, dends, dstates, dnodes,
    base, start, stop, has_end, run, sequence, h, column, H, cap, num_slots, first_level, places,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    ENDS: tl.constexpr, MATH: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One tile of V."""
    SIZE: tl.constexpr = K * V
    for step in range(stop - start):
        i = stop - 1 - step
        row = base + i
        entry = row * H + h
        transition, decay = transitions + entry * (K * K), tl.exp2(tl.load(totals + entry))
        t, reads = slot_of_next(i, num_slots), slots_read(i, num_slots)
        merged = reads & ((2 << t) - 1)
        reads -= merged
        next_kept, has_next = dkept + ((row + 1) * num_slots * H + h) * SIZE, i + 1 < stop
        dstate = next_kept + t.to(tl.int64) * H * SIZE
        if ENDS:
            dstate = tl.where(i == RUN - 1, dends + (run.to(tl.int64) * H + h) * SIZE, dstate)
            has_next = has_next | has_end
        dreads_here, dkept_here = dreads + (row * places * H + h) * SIZE, dkept + (row * num_slots * H + h) * SIZE
        tl.debug_barrier()  # what this program wrote for entry i + 1 is seen
        for a in range(0, K, TK):
            own_TV = tl.zeros([TK, BV], tl.float32)
            if has_next:
                own_TV += load_block(dstate, a, column, K, V, TK, BV).to(tl.float32)
            store_block(dstates + entry * SIZE, a, column, own_TV, K, V, TK, BV)
        if merged > 0:
            add_moved_back(
                transition, decay, dstate, has_next, merged, dreads_here, dkept_here, column, H,
                K, V, TK, BV, MATH,
            )  # fmt: skip
        for _ in range(count_bits(reads)):
            j = nearest(reads)
            reads &= reads - 1
            add_moved_back(
                transition, decay, next_kept + j.to(tl.int64) * H * SIZE, has_next, 1 << j, dreads_here, dkept_here,
                column, H,
                K, V, TK, BV, MATH,
            )  # fmt: skip
    if NODES:
        reads = tl.where(start < stop, slots_read(start, num_slots), 0)
        tl.debug_barrier()
        for _ in range(count_bits(reads)):
            j = nearest(reads)
            reads &= reads - 1
            if first_level + j < cap:
                node = dnodes + ((sequence.to(tl.int64) * (cap + 1) + first_level + j) * H + h) * SIZE
                first = dkept + (((base + start) * num_slots + j) * H + h) * SIZE
                for a in range(0, K, TK):
                    store_block(node, a, column, load_block(first, a, column, K, V, TK, BV), K, V, TK, BV)


@triton.jit
def transport_prefixes_backward(
    transitions, totals, dprefixes, dends, base, start, stop, has_end, run, h, column, H,
    K: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, ENDS: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """One tile of columns, kept in registers."""
    SIZE: tl.constexpr = K * K
    COUNT: tl.constexpr = (K + TK - 1) // TK
    path = ()
    for a in tl.static_range(COUNT):
        end_TV = tl.zeros([TK, BV], MATH.dot)
        if ENDS:
            end_TV = load_block(dends + (run.to(tl.int64) * H + h) * SIZE, a * TK, column, K, K, TK, BV)
            end_TV = tl.where(has_end, end_TV, 0.0).to(MATH.dot)
        path = path + (end_TV,)
    for step in range(stop - start - 1):
        entry = (base + stop - 1 - step) * H + h
        is_made = (step > 0) | has_end  # the sequence's last entry may have no transition, and path is 0
        transition, decay = transitions + entry * SIZE, tl.where(is_made, tl.exp2(tl.load(totals + entry)), 0.0)
        new = ()
        for a in tl.static_range(COUNT):
            path_TV = load_block(dprefixes + entry * SIZE, a * TK, column, K, K, TK, BV).to(tl.float32)
            path_TV += path[a].to(tl.float32) * decay
            for s in tl.static_range(COUNT):
                transition_TT = load_block(transition, s * TK, a * TK, K, K, TK, TK)
                transition_TT = tl.where(is_made, transition_TT, 0.0).to(MATH.dot)
                path_TV = tl.dot(tl.trans(transition_TT), path[s], path_TV, input_precision=MATH.precision)
            store_block(dprefixes + entry * SIZE, a * TK, column, path_TV, K, K, TK, BV)
            new = new + (path_TV.to(MATH.dot),)
        path = new


@triton.jit(do_not_specialize=SIZES)
def transport_backward_kernel(
    transitions, totals, dreads, dkept, dprefixes, dends, dend_transitions, dstates, dnodes, table,
    per_row, H, cap, num_slots, first_level, places,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    ENDS: tl.constexpr, MATH: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One run, one head, BV columns of states or of transitions. dreads [entry, place, H, K, V], the reads' own
    gradients, of which the first places are the slots', become dkept [entry, slot, H, K, V] (which may be the same) and
    dstates [entry, H, K, V]; dprefixes [entry, H, K, K] change in place, but for a run's first entry. dends and
    dend_transitions are the next storey's."""
    VALUES: tl.constexpr = (V + BV - 1) // BV
    KEYS: tl.constexpr = (K + BV - 1) // BV
    tile, h, run = head_program(VALUES + KEYS, H)
    base, start, stop, number, sequence, has_end = locate_entries(run, table, per_row, PACKED)
    if tile < VALUES:
        transport_states_backward(
            transitions, totals, dreads, dkept, dends, dstates, dnodes,
            base, start, stop, has_end, run, sequence, h, tile * BV, H, cap, num_slots, first_level, places,
            K, V, TK, BV, ENDS, MATH, NODES,
        )  # fmt: skip
    else:
        transport_prefixes_backward(
            transitions, totals, dprefixes, dend_transitions,
            base, start, stop, has_end, run, h, (tile - VALUES) * BV, H,
            K, TK, BV, ENDS, MATH,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def transition_backward_kernel(
    kept, prefixes, prefix_totals, dkept, dends, dprefixes, dend_transitions, dtransitions, table,
    per_row, H, num_slots,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    ENDS: tl.constexpr, MATH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One entry of a run, one head, one [TK, TK] tile: dtransitions [entry, H, K, K], 0 of the last one."""
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile, h, part = head_program(TILES * TILES, H)
    i, run = part % RUN, part // RUN
    base, start, stop, number, sequence, has_end = locate_entries(run, table, per_row, PACKED)
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
        has_next = has_next | has_end
    if has_next:
        for _ in range(count_bits(later) + (merged > 0).to(tl.int32)):
            members = tl.where(merged > 0, merged, later & -later)
            source = tl.where(merged > 0, dstate, next_kept + nearest(later).to(tl.int64) * H * (K * V))
            later = tl.where(merged > 0, later, later & (later - 1))
            merged = merged - merged
            for x in range(0, V, BV):
                dstate_TV = load_block(source, a, x, K, V, TK, BV).to(MATH.dot)
                sum_TV = sum_of_slots(kept + (row * num_slots * H + h) * (K * V), members, column, x, H, K, V, TK, BV)
                total = tl.dot(dstate_TV, tl.trans(sum_TV.to(MATH.dot)), total, input_precision=MATH.precision)
        log_decay = tl.load(prefix_totals + entry, mask=i > start, other=0.0)
        total += load_block(dprefix, a, column, K, K, TK, TK).to(tl.float32) * tl.exp2(log_decay)
        if i > start:
            for s in range(0, K, TK):
                dprefix_TT = load_block(dprefix, a, s, K, K, TK, TK)
                prefix_TT = load_block(prefixes + entry * (K * K), column, s, K, K, TK, TK)
                total = tl.dot(dprefix_TT, tl.trans(prefix_TT), total, input_precision=MATH.precision)
    store_block(dtransitions + entry * (K * K), a, column, total, K, K, TK, TK)
