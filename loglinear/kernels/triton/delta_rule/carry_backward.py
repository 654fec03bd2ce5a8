"""What was carried to the runs, and to a sequence's end, differentiated.

    R = F R':   dR' = sum over the entries of the run of F^T dR,   dF = sum over the columns of dR R'^T

An entry's dR of what its own run brought to it is where `transport_backward` begins.
"""

# H heads, K key, V value, M blocks of a state
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.carry import locate_end, older_column
from loglinear.kernels.triton.delta_rule.tiles import RUN, SIZES, columns_read, count_bits, locate_entries, slots_read
from loglinear.kernels.triton.tiles import head_program, load_block, store_block
from loglinear.kernels.triton.walks import nearest


@triton.jit
def moved_back(
    transition, decay, dstate, row, column,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """P^T dS, one [TK, BV] tile, of a transition with its decay apart."""
    total = load_block(dstate, row, column, K, V, TK, BV).to(tl.float32) * decay
    for s in range(0, K, TK):
        transition_TT = load_block(transition, s, row, K, K, TK, TK)
        dstate_TV = load_block(dstate, s, column, K, V, TK, BV).to(MATH.dot)
        total = tl.dot(tl.trans(transition_TT), dstate_TV, total, input_precision=MATH.precision)
    return total


@triton.jit
def add_back_through(
    total, prefix, log_decay, dstate, is_first, row, column,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """total + F^T dR, one [TK, BV] tile; the first entry of a run has no F."""
    if is_first:
        total += load_block(dstate, row, column, K, V, TK, BV).to(tl.float32)
    else:
        total += moved_back(prefix, tl.exp2(log_decay), dstate, row, column, K, V, TK, BV, MATH)
    return total


@triton.jit
def add_outer(
    total, dreads, carried, reads, num_slots, collapsed, row, column, H,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """total + the sum of dR R'^T over the carried columns that are read, one [TK, TK] tile."""
    for _ in range(count_bits(reads)):
        older = nearest(reads).to(tl.int64)
        reads &= reads - 1
        dstate, state = dreads + (older + num_slots - collapsed) * H * (K * V), carried + older * H * (K * V)
        for x in range(0, V, BV):
            dstate_TV = load_block(dstate, row, x, K, V, TK, BV).to(MATH.dot)
            state_TV = load_block(state, column, x, K, V, TK, BV).to(MATH.dot)
            total = tl.dot(dstate_TV, tl.trans(state_TV), total, input_precision=MATH.precision)
    return total


@triton.jit(do_not_specialize=SIZES)
def carry_states_backward_kernel(
    prefixes, prefix_totals, dreads, dcarried, table,
    per_row, H, num_slots, columns, collapsed, places,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One column of what a run was carried, one head, one [TK, BV] tile: dcarried [run, column, H, K, V] from dreads
    [entry, place, H, K, V]."""
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(ROWS * TILES, H)
    older, run = part % columns, part // columns
    base, start, stop, number, sequence, has_end = locate_entries(run, table, per_row, PACKED)
    if (stop <= start) | ((columns_read(number, columns, NODES) >> older) & 1 == 0):
        return
    row, column = tile // TILES * TK, tile % TILES * BV
    total = tl.zeros([TK, BV], tl.float32)
    for i in range(start, stop):
        entry = (base + i) * H + h
        dstate = dreads + (((base + i) * places + older + num_slots - collapsed) * H + h) * (K * V)
        log_decay = tl.load(prefix_totals + entry, mask=i > start, other=0.0)
        total = add_back_through(
            total, prefixes + entry * (K * K), log_decay, dstate, i == start, row, column,
            K, V, TK, BV, MATH,
        )  # fmt: skip
    out = dcarried + ((run.to(tl.int64) * columns + older) * H + h) * (K * V)
    store_block(out, row, column, total, K, V, TK, BV)


@triton.jit(do_not_specialize=SIZES)
def carry_prefixes_backward_kernel(
    dreads, carried, dprefixes, table,
    per_row, H, num_slots, columns, collapsed, places,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One entry of a run but the first, one head, one [TK, TK] tile: dprefixes [entry, H, K, K]."""
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile, h, part = head_program(TILES * TILES, H)
    base, start, stop, number, sequence, has_end = locate_entries(part // RUN, table, per_row, PACKED)
    i = part % RUN
    if (i <= start) | (i >= stop):
        return
    row, column = tile // TILES * TK, tile % TILES * TK
    dprefix_TT = add_outer(
        tl.zeros([TK, TK], tl.float32), dreads + ((base + i) * places * H + h) * (K * V),
        carried + (part // RUN * columns.to(tl.int64) * H + h) * (K * V), columns_read(number, columns, NODES),
        num_slots, collapsed, row, column, H, K, V, TK, BV, MATH,
    )  # fmt: skip
    store_block(dprefixes + ((base + i) * H + h) * (K * K), row, column, dprefix_TT, K, K, TK, TK)


@triton.jit
def add_to_block(
    out, total, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    total += load_block(out, row, column, HEIGHT, WIDTH, ROWS, COLUMNS).to(tl.float32)
    store_block(out, row, column, total, HEIGHT, WIDTH, ROWS, COLUMNS)


@triton.jit(do_not_specialize=SIZES)
def final_states_backward_kernel(
    prefixes, prefix_totals, dblocks, dkept, dcarried, ends, first_runs,
    N, H, num_slots, columns, collapsed, places,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One block of a sequence's final state, one head, one [TK, BV] tile: adds to dkept and dcarried."""
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(ROWS * TILES, H)
    place, sequence = part % places, part // places
    row, i, start, run, number = locate_end(sequence, ends, first_runs, N, PACKED)
    dstate = dblocks + ((sequence.to(tl.int64) * places + place) * H + h) * (K * V)
    a, column = tile // TILES * TK, tile % TILES * BV
    if (slots_read(i, num_slots) >> tl.minimum(place, 31)) & 1:
        dstate_TV = load_block(dstate, a, column, K, V, TK, BV).to(tl.float32)
        add_to_block(dkept + ((row * num_slots + place) * H + h) * (K * V), dstate_TV, a, column, K, V, TK, BV)
    older, entry = older_column(place, num_slots, columns, collapsed), row * H + h
    if (older >= 0) & (((columns_read(number, columns, NODES) >> tl.maximum(older, 0)) & 1) > 0):
        log_decay = tl.load(prefix_totals + entry, mask=i > start, other=0.0)
        dstate_TV = add_back_through(
            tl.zeros([TK, BV], tl.float32), prefixes + entry * (K * K), log_decay, dstate, i == start, a, column,
            K, V, TK, BV, MATH,
        )  # fmt: skip
        out = dcarried + ((run.to(tl.int64) * columns + older) * H + h) * (K * V)
        add_to_block(out, dstate_TV, a, column, K, V, TK, BV)


@triton.jit(do_not_specialize=SIZES)
def final_prefixes_backward_kernel(
    dblocks, carried, dprefixes, ends, first_runs,
    N, H, num_slots, columns, collapsed, places,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One sequence's end, one head, one [TK, TK] tile: adds to dprefixes."""
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile, h, sequence = head_program(TILES * TILES, H)
    row, i, start, run, number = locate_end(sequence, ends, first_runs, N, PACKED)
    if i == start:
        return
    a, column = tile // TILES * TK, tile % TILES * TK
    dprefix_TT = add_outer(
        tl.zeros([TK, TK], tl.float32), dblocks + (sequence.to(tl.int64) * places * H + h) * (K * V),
        carried + (run.to(tl.int64) * columns * H + h) * (K * V), columns_read(number, columns, NODES),
        num_slots, collapsed, a, column, H, K, V, TK, BV, MATH,
    )  # fmt: skip
    add_to_block(dprefixes + (row * H + h) * (K * K), dprefix_TT, a, column, K, K, TK, TK)
