"""The blocks that a chunk reads, on the device: candidates, decays on the way to them, places of their states."""

# l candidate read, z chunk number in its sequence, z0 its first chunk, e exclusive end of a block in chunks
import triton
import triton.language as tl

from loglinear.kernels.triton import layout
from loglinear.kernels.triton.tiles import TIER, exponent

READS = tl.constexpr(layout.READS)  # candidate reads of a walk: levels between chunks


@triton.jit
def walk(place, cap):
    """The reads of a chunk as vectors over READS candidates: is it read, exclusive end of the block, is it initial.

    Below the cap candidate l is the block of 2**l chunks, read where bit l of z is set. The older past is one slot for
    each tier: candidate max(cap, TIER s) stands for the rest of tier s. Blocks that end at or before z0, where a
    continued sequence begins, come from the initial state, the oldest with the whole prefix in it.
    """
    l, oldest = tl.arange(0, READS), tl.minimum(cap, 31)
    digit = tl.where(l < cap, 1, (1 << ((l // TIER + 1) * TIER - l)) - 1) & (place.z >> l)
    is_first = (l <= cap) | (l % TIER == 0)
    end = (place.z >> l) << l
    is_initial = end <= place.z0
    is_there = (end > place.z0) | (l < cap) | (end == (place.z0 >> oldest) << oldest)
    return is_first & (digit > 0) & is_there, end, is_initial


@triton.jit
def reader_level(e, cap):
    """The candidate through which the readers of the slot of chunk e see it; they are the 2**l chunks behind it."""
    t = exponent((e + 1) & -(e + 1))
    return tl.where(t < cap, t, tl.maximum(cap, t // TIER * TIER))


@triton.jit
def load_log_decays(log_decay, place, sizes, h):
    """log2 of the decay of each block that a chunk reads, 0 for those that it does not read and for initial ones."""
    read, end, _ = walk(place, sizes.cap)
    row = (place.c - place.z).to(tl.int64) + end - 1
    return tl.load(log_decay + row * sizes.H + h, mask=read & (end > place.z0), other=0.0)


@triton.jit
def paths(log_decay, place, sizes, h):
    """For each candidate: is it read, and its path, log2 of the decay from the block's end to the chunk."""
    read, _, _ = walk(place, sizes.cap)
    log_block = load_log_decays(log_decay, place, sizes, h)
    return read, tl.cumsum(log_block, 0) - log_block


@triton.jit
def path_of(l, log_block):
    """The path of one candidate: log2 of the decay over the nearer blocks."""
    return tl.sum(tl.where(tl.arange(0, READS) < l, log_block, 0.0), 0)


@triton.jit
def nearest(remaining):
    """The first candidate in a set of candidates given as bits; 0 when there is none."""
    return tl.maximum(exponent(remaining & -remaining), 0)


@triton.jit
def initial_row(place, l, sizes, h):
    """The row in the initial state [N, M, H] of the block that candidate l stands for."""
    m = tl.minimum(l, sizes.cap)
    return (place.sequence.to(tl.int64) * (sizes.cap + 1) + m) * sizes.H + h


@triton.jit
def slot_pointer(states, place, l, sizes, h, SIZE: tl.constexpr):
    """The address of the state that candidate l of a chunk's walk reads."""
    end = (place.z >> l) << l
    pointer = states.slots + (((place.c - place.z).to(tl.int64) + end - 1) * sizes.H + h) * SIZE
    if states.initial is not None:
        initial = states.initial + initial_row(place, l, sizes, h) * SIZE
        pointer = tl.where(end <= place.z0, initial, pointer)
    return pointer
