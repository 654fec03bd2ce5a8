"""States of older blocks, brought to where they are needed: a walk with X = I.

    for each block on the walk, nearest first:   R = Y S_block,   Y <- Y P_block,   from Y = I

A carrier is the first token of a run, for the blocks of 8 and more chunks (all chunks of the run read R, and none of
them the blocks), or the end of a sequence, for all of its blocks (they become its final state). Blocks from the cap on
are summed into the last column.
"""

# H heads, K key, V value, l candidate read
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import (
    BITS,
    copy,
    count_bits,
    multiply,
    reads_of,
    reads_of_column,
    store_identity,
)
from loglinear.kernels.triton.tiles import SIZES, head_program, load_block, locate_run, store_block
from loglinear.kernels.triton.walks import nearest, slot_pointer


@triton.jit
def carrier(number, runs, ends, T, N, C: tl.constexpr, PACKED: tl.constexpr, ENDS: tl.constexpr):
    """Row of the sequence's chunk 0, the carrier's chunk, first chunk and sequence. It need not exist: z is 0 then."""
    if ENDS:
        if PACKED:
            origin = tl.load(ends + number * 3).to(tl.int64)
            z, z0 = tl.load(ends + number * 3 + 1), tl.load(ends + number * 3 + 2)
        else:
            origin, z, z0 = number.to(tl.int64) * N, T // C, tl.full([], 0, tl.int32)
        sequence = number
    else:
        origin, count, run, z0, sequence = locate_run(number, runs, N, 0, PACKED, BITS)
        z = tl.where((run << BITS) < count, run << BITS, 0)
    return origin, z, z0, sequence


@triton.jit(do_not_specialize=SIZES)
def carry_transitions_kernel(
    transitions, paths, runs, ends,
    T, N, H, cap, candidates,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, ENDS: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One carrier, one head: Y of each candidate from the second read on, paths [carrier, candidate, H, K, K]."""
    SIZE: tl.constexpr = K * K
    LOW: tl.constexpr = 0 if ENDS else BITS
    _, h, number = head_program(1, H)
    origin, z, z0, sequence = carrier(number, runs, ends, T, N, C, PACKED, ENDS)
    remaining = reads_of(z, z0, cap)
    paths += (number.to(tl.int64) * candidates * H + h) * SIZE
    path = paths
    for step in range(count_bits(remaining) - 1):
        l = nearest(remaining)
        remaining &= remaining - 1
        target = paths + (nearest(remaining) - LOW).to(tl.int64) * H * SIZE
        end = (z >> l) << l
        block = transitions + ((origin + end - 1) * H + h) * SIZE
        if end <= z0:  # a node: nothing happens from it to the next
            if step == 0:
                store_identity(target, K, TK)
            else:
                copy(path, target, K, TK)
        elif step == 0:
            copy(block, target, K, TK)
        else:
            multiply(path, block, target, K, TK, PRECISION)
        path = target


@triton.jit(do_not_specialize=SIZES)
def carry_states_kernel(
    slots, nodes, paths, carried, runs, ends,
    T, N, H, cap, columns, candidates,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, ENDS: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One carrier, one column, one head, one tile of V: carried [carrier, column, H, K, V], 0 where nothing is read."""
    LOW: tl.constexpr = 0 if ENDS else BITS
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(TILES, H)
    column, number = part % columns, part // columns
    origin, z, z0, sequence = carrier(number, runs, ends, T, N, C, PACKED, ENDS)
    reads = reads_of(z, z0, cap)
    nearest_read, mine = nearest(reads), reads_of_column(reads, column, cap, LOW)
    out = carried + ((number.to(tl.int64) * columns + column) * H + h) * (K * V)
    for kt in range(0, K, TK):
        state = tl.zeros([TK, BV], tl.float32)
        remaining = mine
        for _ in range(count_bits(mine)):
            l = nearest(remaining)
            remaining &= remaining - 1
            block = slot_pointer(slots, nodes, origin + z, z, z0, sequence, l, cap, h, H, K * V, NODES)
            if l == nearest_read:
                state += load_block(block, kt, tile * BV, K, V, TK, BV).to(tl.float32)
            else:
                path = paths + ((number.to(tl.int64) * candidates + l - LOW) * H + h) * (K * K)
                for s in range(0, K, TK):
                    path_TT = load_block(path, kt, s, K, K, TK, TK)
                    state_TV = load_block(block, s, tile * BV, K, V, TK, BV)
                    state = tl.dot(path_TT, state_TV, state, input_precision=PRECISION)
        store_block(out, kt, tile * BV, state, K, V, TK, BV)
