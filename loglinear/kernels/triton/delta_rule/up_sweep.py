"""The Fenwick array of transitions and states, one storey (three levels, 8 entries) at a time.

    P_block = P_right P_left           S_block = P_right S_left + S_right

An entry of storey s is a chunk e with e + 1 a multiple of 8**s; it stands for the 8**s chunks that end there. From the
cap on, blocks merge with the prefix of their run. One program takes the entries of a run in order, each with all blocks
on its left: first the transitions, then, for tiles of V on their own, the states. Each block is the left one of at most
one merge: `rights`, at its row, keeps P_right of that merge for the states and for the backward.
"""

# H heads, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import (
    BITS,
    RUN,
    copy,
    levels_below,
    multiply,
    node_row,
    num_merges,
    real_merges,
)
from loglinear.kernels.triton.tiles import SIZES, head_program, load_block, locate_run, store_block


@triton.jit
def run_entries(run, table, N, cap, storey, PACKED: tl.constexpr):
    """A run's entries start .. stop - 1, from 1; entry i is chunk (before + i << shift) - 1 of its sequence, which
    begins at row `origin`. rel: how many levels of the storey lie below the cap."""
    origin, count, number, z0, sequence = locate_run(run, table, N, storey, PACKED, BITS)
    before, shift = number * RUN, tl.zeros([], tl.int32) + BITS * storey
    start = tl.maximum((z0 >> shift) - before, 0) + 1
    stop = tl.minimum((count >> shift) - before, RUN) + 1
    return origin, before, start, stop, shift, levels_below(cap, storey), z0, sequence


@triton.jit(do_not_specialize=SIZES)
def transition_sweep_kernel(
    transitions, rights, runs,
    N, H, cap, storey,
    K: tl.constexpr, TK: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One run, one head: transitions [chunk, H, K, K] in place, rights [chunk, H, K, K]. FIRST storey: an entry that
    merges is in rights already."""
    SIZE: tl.constexpr = K * K
    _, h, run = head_program(1, H)
    origin, before, start, stop, shift, rel, z0, sequence = run_entries(run, runs, N, cap, storey, PACKED)
    for i in range(start, stop):
        z = ((before + i) << shift) - 1
        row = origin + z
        slot = transitions + (row * H + h) * SIZE
        merges = real_merges(i, z, z0, rel, shift)
        source = rights + ((row - (1 << shift)) * H + h) * SIZE
        if (not FIRST) & (merges > 0):
            copy(slot, source, K, TK)
        for m in range(merges):
            left, farther = row - (1 << (shift + m)), row - (1 << (shift + m + 1))
            target = tl.where(m + 1 < merges, rights + (farther * H + h) * SIZE, slot)
            multiply(source, transitions + (left * H + h) * SIZE, target, K, TK, PRECISION)
            source = target


@triton.jit(do_not_specialize=SIZES)
def state_sweep_kernel(
    transitions, rights, slots, nodes, runs,
    N, H, cap, storey,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One run, one head, one tile of V: slots [chunk, H, K, V] in place."""
    SIZE: tl.constexpr = K * V
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, run = head_program(TILES, H)
    origin, before, start, stop, shift, rel, z0, sequence = run_entries(run, runs, N, cap, storey, PACKED)
    for i in range(start, stop):
        z = ((before + i) << shift) - 1
        row = origin + z
        slot = slots + (row * H + h) * SIZE
        merges = num_merges(i, rel)
        if merges > 0:
            tl.debug_barrier()  # what this program wrote to the left blocks is seen
            for t in range(0, K, TK):
                state = load_block(slot, t, tile * BV, K, V, TK, BV).to(tl.float32)
                for m in range(merges):
                    z_left, left = z - (1 << (shift + m)), row - (1 << (shift + m))
                    block, exists = slots + (left * H + h) * SIZE, z_left >= z0
                    through = rights + (left * H + h) * (K * K)
                    if NODES:
                        node = node_row(z_left, z0, sequence, cap)
                        block = tl.where(exists, block, nodes + (node * H + h) * SIZE)
                        through = tl.where(exists, through, transitions + (row * H + h) * (K * K))
                        exists = exists | (node >= 0)
                    if exists:
                        for s in range(0, K, TK):
                            right_TT = load_block(through, t, s, K, K, TK, TK)
                            left_TV = load_block(block, s, tile * BV, K, V, TK, BV)
                            state = tl.dot(right_TT, left_TV, state, input_precision=PRECISION)
                store_block(slot, t, tile * BV, state, K, V, TK, BV)
