"""What is older than a run, carried to its start.

What entry i of a run of the next storey reads is what the run of its chunks is carried: what was brought to the entry,
and what had been carried to the start of the run that the entry is in, brought on by F:

    R[column] = Y[slot] + F R'[column'],   each where there is one

and for a sequence's end, the start of its unfinished chunk, the same is its final state.
"""

# H heads, K key, V value, M blocks of a state
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import (
    RUN,
    SIZES,
    columns_read,
    locate_entries,
    locate_in_run,
    slots_read,
)
from loglinear.kernels.triton.tiles import head_program, load_block, store_block


@triton.jit
def older_column(column, num_slots, columns, collapsed):
    """The carried column that is brought on into a column, or -1."""
    older = column - num_slots + collapsed
    return tl.where(older < columns, older, -1)


@triton.jit
def add_through(
    total, prefix, log_decay, state, is_first, row, column,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """total + F R, one [TK, BV] tile; the first entry of a run has no F."""
    state_TV = load_block(state, row, column, K, V, TK, BV).to(tl.float32)
    if is_first:
        total += state_TV
    else:
        total += state_TV * tl.exp2(log_decay)
        for s in range(0, K, TK):
            prefix_TT = load_block(prefix, row, s, K, K, TK, TK)
            source_TV = load_block(state, s, column, K, V, TK, BV).to(MATH.dot)
            total = tl.dot(prefix_TT, source_TV, total, input_precision=MATH.precision)
    return total


@triton.jit
def read_at(
    kept, prefixes, prefix_totals, carried, out, row, i, start, run, number, place, h, H, column,
    num_slots, columns, collapsed,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """out = what entry i, in `row`, reads in column `place`, one tile of V."""
    SIZE: tl.constexpr = K * V
    entry, older = row * H + h, older_column(place, num_slots, columns, collapsed)
    is_kept = (slots_read(i, num_slots) >> tl.minimum(place, 31)) & 1
    is_carried = (older >= 0) & (((columns_read(number, columns, NODES) >> tl.maximum(older, 0)) & 1) > 0)
    for a in range(0, K, TK):
        state_TV = tl.zeros([TK, BV], tl.float32)
        if is_kept:
            block = kept + ((row * num_slots + place) * H + h) * SIZE
            state_TV += load_block(block, a, column, K, V, TK, BV).to(tl.float32)
        if is_carried:
            block = carried + ((run.to(tl.int64) * columns + older) * H + h) * SIZE
            log_decay = tl.load(prefix_totals + entry, mask=i > start, other=0.0)
            state_TV = add_through(
                state_TV, prefixes + entry * (K * K), log_decay, block, i == start, a, column,
                K, V, TK, BV, MATH,
            )  # fmt: skip
        store_block(out, a, column, state_TV, K, V, TK, BV)


@triton.jit(do_not_specialize=SIZES)
def carry_kernel(
    kept, prefixes, prefix_totals, carried, out, table,
    per_row, H, num_slots, columns, collapsed, places,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One entry of a run, one column of what it is carried, one head, one tile of V: out [entry, place, H, K, V]."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(TILES, H)
    place, i, run = part % places, part // places % RUN, part // places // RUN
    base, start, stop, number, sequence, has_end = locate_entries(run, table, per_row, PACKED)
    if (i < start) | (i >= stop):
        return
    row = base + i
    read_at(
        kept, prefixes, prefix_totals, carried, out + ((row * places + place) * H + h) * (K * V),
        row, i, start, run, number, place, h, H, tile * BV, num_slots, columns, collapsed,
        K, V, TK, BV, MATH, NODES,
    )  # fmt: skip


@triton.jit
def locate_end(sequence, ends, first_runs, N, PACKED: tl.constexpr):
    """A sequence's unfinished chunk: its row, number in its run, the first chunk's there, the run's row and number."""
    if PACKED:
        row = tl.load(ends + sequence * 3).to(tl.int64)
        z, z0 = tl.load(ends + sequence * 3 + 1), tl.load(ends + sequence * 3 + 2)
    else:
        row = (sequence + 1).to(tl.int64) * N - 1
        z, z0 = N - tl.full([], 1, tl.int32), tl.zeros([], tl.int32)
    i, start, run = locate_in_run(z, z0, sequence, first_runs, N, PACKED)
    return row, i, start, run, z // RUN


@triton.jit(do_not_specialize=SIZES)
def final_blocks_kernel(
    kept, prefixes, prefix_totals, carried, out, ends, first_runs,
    N, H, num_slots, columns, collapsed, places,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One block of a sequence's final state, one head, one tile of V: out [N, M, H, K, V]."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(TILES, H)
    place, sequence = part % places, part // places
    row, i, start, run, number = locate_end(sequence, ends, first_runs, N, PACKED)
    read_at(
        kept, prefixes, prefix_totals, carried, out + ((sequence.to(tl.int64) * places + place) * H + h) * (K * V),
        row, i, start, run, number, place, h, H, tile * BV, num_slots, columns, collapsed,
        K, V, TK, BV, MATH, NODES,
    )  # fmt: skip
