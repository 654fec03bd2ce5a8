"""The Fenwick array of states, built and differentiated one tier (six levels, 64 entries) at a time.

Up:    Y_e = sum over the entries s of e's block of exp(log decay from s to e) X_s, a product with one 64 x 64 matrix W.
Down:  dX = W^T dY, and the gradient of every log decay.

An entry of tier s is a chunk e with e + 1 a multiple of 64**s; it stands for the 64**s chunks that end there. Entry
number j (from 1) of a run covers its last lowbit(j) entries; from the cap on, all entries since the run's start. With a
larger radix r it covers the largest power of r up to lowbit(j), whatever the cap, and a tier is whole digits: 16
entries with radix 16.
"""

# H heads, E numbers of a state in one tile
from typing import NamedTuple

import triton
import triton.language as tl

from loglinear.kernels.triton.args import SIZES, Sizes
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.scalar_gate.states import Inputs, StateGradients, States, Totals
from loglinear.kernels.triton.tiles import dot_float32, exponent, head_program, locate_run
from loglinear.kernels.triton.walks import block_row, prefix_end


class Entries(NamedTuple):
    """The entries of a run: their chunks' rows and numbers, which exist; which are ends of initial blocks, and those
    blocks' rows."""

    rows: tl.tensor
    z: tl.tensor
    exist: tl.tensor
    are_initial: tl.tensor
    initial_rows: tl.tensor


@triton.jit
def run_entries(run, sizes, tier, h, TREE: tl.constexpr):
    RUN: tl.constexpr = 1 << TREE.tier
    z = ((run.number * RUN + tl.arange(0, RUN) + 1) << (TREE.tier * tier)) - 1
    end = z + 1
    t, z0, cap = exponent(end & -end), run.z0, sizes.cap
    if TREE.radix_log == 1:
        m = tl.minimum(t, cap)
        are_ends = ((z0 >> m) << m) == end
    else:
        digit = t // TREE.radix_log
        height = digit * TREE.radix_log
        next_height = tl.minimum(height + TREE.radix_log, 31)
        m = tl.minimum(digit * TREE.others + (z0 >> height) - (end >> height), cap)
        are_ends = (z0 >> next_height == end >> next_height) & ((m < cap) | (end == prefix_end(z0, cap, TREE)))
    rows = block_row(run.sequence, m, sizes, h)
    return Entries(run.origin + z, z, (z < run.count) & (z >= z0), (z < z0) & are_ends, rows)


@triton.jit
def covers(entry, other, cap, tier, TREE: tl.constexpr):
    """Does the slot of `entry` hold the part of `other`? Both number the entries of a run from 1."""
    low = entry & -entry
    if TREE.radix_log == 1:
        rel = tl.maximum(cap - TREE.tier * tier, 0)
        size = tl.where(exponent(low) < rel, low, entry)
    else:
        size = 1 << exponent(low) // TREE.radix_log * TREE.radix_log
    return (other <= entry) & (other > entry - size)


@triton.jit
def parent_of(entry, cap, tier, TREE: tl.constexpr):
    """The entry whose slot is the next larger one to hold `entry`; behind the run where there is none in it."""
    low = entry & -entry
    if TREE.radix_log == 1:
        rel = tl.maximum(cap - TREE.tier * tier, 0)
        return entry + tl.where(exponent(low) < rel, low, 1 << tl.minimum(rel, TREE.tier))
    else:
        next_height = (exponent(low) // TREE.radix_log + 1) * TREE.radix_log
        return ((entry >> next_height) + 1) << next_height


@triton.jit
def log_decays(log_total):
    """[e, s] = sum of log_total over s < u <= e, through float64: a difference of sums that keeps its digits."""
    total = tl.cumsum(log_total.to(tl.float64), 0)
    return (total[:, None] - total[None, :]).to(tl.float32)


@launcher
@triton.jit(do_not_specialize=SIZES)
def up_sweep_kernel(
    states,
    totals,
    next_totals,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    tier,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    STEPS: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One run, one head, STEPS tiles of the states. Slots in place; totals -> log decays of blocks, and next_totals at
    run ends."""
    sizes = Sizes(T, N, H, R, L, cap)
    RUN: tl.constexpr = 1 << TREE.tier
    PARTS: tl.constexpr = (SIZE + E * STEPS - 1) // (E * STEPS)
    part, h, run = head_program(PARTS, sizes.H)
    e = run_entries(locate_run(run, table, sizes, tier, TREE), sizes, tier, h, TREE)
    j, row = tl.arange(0, RUN) + 1, e.rows * sizes.H + h
    log_total = tl.load(totals + row, mask=e.exist, other=0.0)
    inside = covers(j[:, None], j[None, :], sizes.cap, tier, TREE)
    weights = tl.where(inside, tl.exp2(log_decays(log_total)), 0.0)
    if part == 0:
        block = tl.sum(tl.where(inside, log_total[None, :], 0.0), 1)
        tl.store(states.log_decay + row, block, mask=e.exist)
        run_total = tl.sum(log_total, 0)
        tl.store(next_totals + row, tl.zeros_like(block) + run_total, mask=e.exist & (j == RUN))
    unchanged = tl.sum(inside.to(tl.int32), 1) == 1
    for step in range(STEPS):
        x = (part * STEPS + step) * E + tl.arange(0, E)
        pointers = states.slots + row[:, None] * SIZE + x[None, :]
        mask = e.exist[:, None] & (x < SIZE)[None, :]
        own = tl.load(pointers, mask=mask, other=0.0)
        if states.initial is not None:
            initial = states.initial + e.initial_rows[:, None] * SIZE + x[None, :]
            own += tl.load(initial, mask=e.are_initial[:, None] & (x < SIZE)[None, :], other=0.0).to(MATH.dot)
        block = dot_float32(weights, own, MATH)
        tl.store(pointers, block.to(states.slots.dtype.element_ty), mask=mask & (unchanged == 0)[:, None])


@launcher
@triton.jit(do_not_specialize=SIZES)
def down_sweep_kernel(
    states,
    dstates,
    totals,
    dtotals,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    tier,
    is_top,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    STEPS: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """The adjoint, in place: dstates.slots comes in as dY, leaves as dX. dtotals gets, at the tier's entries, this
    part's share of the gradient of the entry's total."""
    sizes = Sizes(T, N, H, R, L, cap)
    RUN: tl.constexpr = 1 << TREE.tier
    PARTS: tl.constexpr = (SIZE + E * STEPS - 1) // (E * STEPS)
    part, h, run = head_program(PARTS, sizes.H)
    e = run_entries(locate_run(run, table, sizes, tier, TREE), sizes, tier, h, TREE)
    j, row = tl.arange(0, RUN) + 1, e.rows * sizes.H + h
    log_total = tl.load(totals + row, mask=e.exist, other=0.0)
    inside = covers(j[None, :], j[:, None], sizes.cap, tier, TREE)  # [s, e]
    beyond = inside & (j[:, None] != j[None, :])
    weights = tl.where(beyond, tl.exp2(-log_decays(log_total)), 0.0)
    dlog_entry = tl.zeros([RUN], tl.float32)
    for step in range(STEPS):
        x = (part * STEPS + step) * E + tl.arange(0, E)
        offsets = row[:, None] * SIZE + x[None, :]
        mask = e.exist[:, None] & (x < SIZE)[None, :]
        dblock = tl.load(dstates.slots + offsets, mask=mask, other=0.0)
        block = tl.load(states.slots + offsets, mask=mask, other=0.0)
        through = dot_float32(weights, dblock, MATH)
        dlog_entry += tl.sum(through * block.to(tl.float32), 1)
        if states.initial is not None:
            offsets_n = e.initial_rows[:, None] * SIZE + x[None, :]
            mask_n = e.are_initial[:, None] & (x < SIZE)[None, :]
            initial = tl.load(states.initial + offsets_n, mask=mask_n, other=0.0).to(tl.float32)
            dlog_entry += tl.sum(through * initial, 1)
            dinitial = through + tl.load(dstates.initial + offsets_n, mask=mask_n, other=0.0)
            tl.store(dstates.initial + offsets_n, dinitial, mask=mask_n)
        dslot = (dblock.to(tl.float32) + through).to(dstates.slots.dtype.element_ty)
        tl.store(dstates.slots + offsets, dslot, mask=mask)
    # What leaves entry j goes to its parent, and crosses the entries in between: every one after j up to the parent.
    parent = parent_of(j, sizes.cap, tier, TREE)
    crossed = (j[None, :] > j[:, None]) & (j[None, :] <= parent[:, None])  # [from, crossed]
    dtotal = tl.sum(tl.where(crossed, dlog_entry[:, None], 0.0), 0)
    if part == 0:
        # The last entry of a run got its log decay one tier higher, where there is one.
        dblock_log = tl.load(dstates.log_decay + row, mask=e.exist & (j < is_top + RUN), other=0.0)
        dtotal += tl.sum(tl.where(inside, dblock_log[None, :], 0.0), 1)
    tl.store(dtotals.data + tier * dtotals.tier + part * dtotals.part + row, dtotal, mask=e.exist)


def is_merged(x: Inputs) -> bool:
    """Has every row of a batch one chunk? Then its state is its block, and the sweeps change nothing."""
    return x.layout.table is None and x.layout.chunks_per_row == 1


def up_sweep(x: Inputs, states: States, launch: Launch) -> States:
    """Merge the chunks' states, in place, into the Fenwick array, tier after tier."""
    if is_merged(x):
        return states._replace(log_decay=states.totals[0])
    sizes, size = x.parts
    tile, steps, programs = x.sweep_tiles(launch)
    for tier, runs in enumerate(x.layout.runs):
        up_sweep_kernel[(runs * sizes.H * programs,)](
            states,
            states.totals[tier],
            states.totals[tier + 1],
            x.layout.run_tables[tier],
            *sizes,
            tier,
            SIZE=size,
            E=tile,
            STEPS=steps,
            TREE=x.tree,
            MATH=x.math,
            **launch.options,
        )
    return states


def down_sweep(x: Inputs, states: States, dstates: StateGradients, launch: Launch) -> Totals:
    """Turn the gradients of the array's slots, in place, into those of the chunks' states; and those of the totals."""
    if is_merged(x):
        return Totals(dstates.log_decay[None, None], 0, 0)
    runs, (sizes, size) = x.layout.runs, x.parts
    tile, steps, programs = x.sweep_tiles(launch)
    dtotals = x.empty(len(runs), programs, x.layout.chunks, sizes.H)
    strided = Totals(dtotals, dtotals.stride(0), dtotals.stride(1))
    for tier in reversed(range(len(runs))):
        is_top = int(tier == len(runs) - 1)
        down_sweep_kernel[(runs[tier] * sizes.H * programs,)](
            states,
            dstates,
            states.totals[tier],
            strided,
            x.layout.run_tables[tier],
            *sizes,
            tier,
            is_top,
            SIZE=size,
            E=tile,
            STEPS=steps,
            TREE=x.tree,
            MATH=x.math,
            **launch.options,
        )
    return strided
