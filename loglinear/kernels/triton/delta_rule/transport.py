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

from loglinear.kernels.triton.delta_rule.tiles import RUN, SIZES, locate_entries, slot_of_next, slots_read
from loglinear.kernels.triton.tiles import head_program, load_block, store_block

SLOTS = tl.constexpr(3)  # at most


@triton.jit
def last_step(stop, ENDS: tl.constexpr):
    """Behind the last entry that is to be multiplied with: a whole run has an end, if there is a next storey."""
    if ENDS:
        return tl.where(stop == RUN, stop, stop - 1)
    else:
        return stop - 1


@triton.jit
def zero_tiles(COUNT: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros([TK, BV], DOT),)
    return tiles


@triton.jit
def load_column(base, column, K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr):
    """All K rows of BV columns, in tiles of TK rows."""
    tiles = ()
    for a in tl.static_range(0, K, TK):
        tiles = tiles + (load_block(base, a, column, K, V, TK, BV),)
    return tiles


@triton.jit
def store_column(base, tiles, column, K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr):
    for a in tl.static_range((K + TK - 1) // TK):
        store_block(base, a * TK, column, tiles[a], K, V, TK, BV)


@triton.jit
def moved(transition, decay, tiles, K: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """P times a column of tiles."""
    new = ()
    for a in tl.static_range((K + TK - 1) // TK):
        total_TV = tiles[a].to(tl.float32) * decay
        for s in tl.static_range((K + TK - 1) // TK):
            transition_TT = load_block(transition, a * TK, s * TK, K, K, TK, TK)
            total_TV = tl.dot(transition_TT, tiles[s].to(DOT), total_TV, input_precision=PRECISION)
        new = new + (total_TV,)
    return new


@triton.jit
def add_tiles(x, y, DTYPE: tl.constexpr):
    """x + y, column by column, in DTYPE."""
    new = ()
    for a in tl.static_range(len(x)):
        new = new + ((x[a].to(tl.float32) + y[a].to(tl.float32)).to(DTYPE),)
    return new


@triton.jit
def choose(condition, x, y):
    """x where the condition holds, else y, of y's dtype."""
    new = ()
    for a in tl.static_range(len(x)):
        new = new + (tl.where(condition, x[a].to(y[a].dtype), y[a]),)
    return new


@triton.jit
def part(tiles, j: tl.constexpr, COUNT: tl.constexpr):
    """The tiles of slot j."""
    new = ()
    for a in tl.static_range(COUNT):
        new = new + (tiles[j * COUNT + a],)
    return new


@triton.jit(do_not_specialize=SIZES)
def transport_states_kernel(
    transitions, totals, states, nodes, kept, ends, table,
    per_row, H, cap, num_slots, first_level,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    ENDS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One run, one head, one tile of V: kept [entry, slot, H, K, V], where it is read, and the run's S, ends [run, H, K,
    V]. A continued sequence begins with nodes."""
    SIZE: tl.constexpr = K * V
    TILES: tl.constexpr = (V + BV - 1) // BV
    COUNT: tl.constexpr = (K + TK - 1) // TK
    tile, h, run = head_program(TILES, H)
    base, start, stop, number, sequence = locate_entries(run, table, per_row, PACKED)
    column = tile * BV
    held = ()  # what the entry reads
    for j in tl.static_range(SLOTS):
        state = zero_tiles(COUNT, TK, BV, DOT)
        if NODES:
            if ((slots_read(start, num_slots) >> j) & 1 > 0) & (start < stop):
                if first_level + j < cap:  # the prefix is carried
                    node = (sequence.to(tl.int64) * (cap + 1) + first_level + j) * H + h
                    state = load_column(nodes + node * SIZE, column, K, V, TK, BV)
                store_column(kept + (((base + start) * num_slots + j) * H + h) * SIZE, state, column, K, V, TK, BV)
        held = held + state
    for i in range(start, last_step(stop, ENDS)):
        row = base + i
        entry, next_kept = row * H + h, kept + ((row + 1) * num_slots * H + h) * SIZE
        t, reads, transition = slot_of_next(i, num_slots), slots_read(i, num_slots), transitions + entry * (K * K)
        target = next_kept + t.to(tl.int64) * H * SIZE
        if ENDS:
            target = tl.where(i == RUN - 1, ends + (run.to(tl.int64) * H + h) * SIZE, target)
        decay = tl.exp2(tl.load(totals + entry))
        own = load_column(states + entry * SIZE, column, K, V, TK, BV)
        merged = zero_tiles(COUNT, TK, BV, tl.float32)
        for j in tl.static_range(SLOTS):
            is_merged = (j <= t) & ((reads >> j) & 1 > 0)
            merged = add_tiles(
                merged, choose(is_merged, part(held, j, COUNT), zero_tiles(COUNT, TK, BV, DOT)), tl.float32
            )
        new = add_tiles(moved(transition, decay, merged, K, TK, DOT, PRECISION), own, DOT)
        store_column(target, new, column, K, V, TK, BV)
        later = choose(t == 0, new, part(held, 0, COUNT))
        for j in tl.static_range(1, SLOTS):
            state = choose(t == j, new, part(held, j, COUNT))
            if (j > t) & ((reads >> j) & 1 > 0):
                state = add_tiles(
                    moved(transition, decay, state, K, TK, DOT, PRECISION),
                    zero_tiles(COUNT, TK, BV, tl.float32), DOT,
                )  # fmt: skip
                store_column(next_kept + tl.full([], j, tl.int64) * H * SIZE, state, column, K, V, TK, BV)
            later = later + state
        held = later


@triton.jit(do_not_specialize=SIZES)
def transport_transitions_kernel(
    transitions, totals, prefixes, prefix_totals, ends, end_totals, table,
    per_row, H,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    ENDS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One run, one head, one tile of columns (V is K): of F, from the run's second entry on, D [entry, H, K, K] and
    log2 of the decay [entry, H]; and of the run's P. With P = g I + D and F = f I + E:  P F = g f I + g E + D E + f D."""
    SIZE: tl.constexpr = K * K
    TILES: tl.constexpr = (V + BV - 1) // BV
    COUNT: tl.constexpr = (K + TK - 1) // TK
    tile, h, run = head_program(TILES, H)
    base, start, stop, number, sequence = locate_entries(run, table, per_row, PACKED)
    column, log_decay = tile * BV, tl.zeros([], tl.float32)
    path = zero_tiles(COUNT, TK, BV, DOT)
    for i in range(start, last_step(stop, ENDS)):
        entry = (base + i) * H + h
        transition, target_total = transitions + entry * SIZE, prefix_totals + entry + H
        target = prefixes + (entry + H) * SIZE
        if ENDS:
            end = run.to(tl.int64) * H + h
            target = tl.where(i == RUN - 1, ends + end * SIZE, target)
            target_total = tl.where(i == RUN - 1, end_totals + end, target_total)
        own, total = load_column(transition, column, K, K, TK, BV), tl.load(totals + entry)
        new = moved(transition, tl.exp2(total), path, K, TK, DOT, PRECISION)
        path = ()
        for a in tl.static_range(COUNT):
            path = path + ((new[a] + own[a].to(tl.float32) * tl.exp2(log_decay)).to(DOT),)
        store_column(target, path, column, K, K, TK, BV)
        log_decay += total
        tl.store(target_total, log_decay)
