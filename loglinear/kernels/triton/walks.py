"""The blocks that a chunk reads, on the device: candidates, decays on the way to them, places of their states."""

# l candidate read, z chunk number in its sequence, z0 its first chunk, e exclusive end of a block in chunks
import triton
import triton.language as tl

from loglinear.kernels.triton.tiles import exponent


@triton.jit
def height_of(l, TREE: tl.constexpr):
    """log2 of the chunks in the block of candidate l."""
    return tl.minimum(l // TREE.others * TREE.radix_log, 31)


@triton.jit
def end_of(z, l, TREE: tl.constexpr):
    """The exclusive end of the block that candidate l of chunk z is."""
    if TREE.radix_log == 1:
        return (z >> l) << l
    else:
        height = height_of(l, TREE)
        return ((z >> height) - l % TREE.others) << height


@triton.jit
def initial_number(place, l, cap, TREE: tl.constexpr):
    """The number among the initial blocks of the block that candidate l is: its candidate as seen from chunk z0."""
    if TREE.radix_log == 1:
        return tl.minimum(l, cap)
    else:
        height = height_of(l, TREE)
        return tl.minimum(l - (place.z >> height) + (place.z0 >> height), cap)


@triton.jit
def prefix_end(z0, cap, TREE: tl.constexpr):
    """The exclusive end of the oldest initial block, block cap, which has the whole prefix in it."""
    if TREE.radix_log == 1:
        oldest = tl.minimum(cap, 31)
        return (z0 >> oldest) << oldest
    else:
        height = height_of(cap, TREE)
        blocks = z0 >> height
        return (blocks - tl.minimum(blocks & TREE.others, cap % TREE.others)) << height


@triton.jit
def walk(place, cap, TREE: tl.constexpr):
    """The reads of a chunk as vectors over its candidates: is it read, exclusive end of the block, is it initial.

    With radix 2 the past older than the cap is one slot for each tier: candidate max(cap, TIER s) stands for the rest
    of tier s. Blocks that end at or before z0, where a continued sequence begins, come from the initial state, the
    oldest with the whole prefix in it.
    """
    l = tl.arange(0, TREE.reads)
    end = end_of(place.z, l, TREE)
    is_there = (end > place.z0) | (initial_number(place, l, cap, TREE) < cap) | (end == prefix_end(place.z0, cap, TREE))
    if TREE.radix_log == 1:
        rest = (1 << ((l // TREE.tier + 1) * TREE.tier - l)) - 1
        digit = tl.where(l < cap, 1, rest) & (place.z >> l)
        is_read = ((l <= cap) | (l % TREE.tier == 0)) & (digit > 0)
    else:
        is_read = ((place.z >> height_of(l, TREE)) & TREE.others) > l % TREE.others
    return is_read & is_there, end, end <= place.z0


# The reads of a walk one by one, nearest first. Where a walk stands is the set of the candidates that it has yet to
# read, as bits; with a larger radix, whose candidates are too many, it is the exclusive end of the next block.


@triton.jit
def start_of_walk(read, place, TREE: tl.constexpr):
    if TREE.radix_log == 1:
        return tl.sum(tl.where(read, 1 << tl.arange(0, TREE.reads), 0), 0)
    else:
        return place.z


@triton.jit
def candidate_at(stand, place, TREE: tl.constexpr):
    """The candidate that a walk reads next; any number behind the last one."""
    if TREE.radix_log == 1:
        return nearest(stand)
    else:
        digit = tl.maximum(exponent(stand & -stand), 0) // TREE.radix_log
        height = digit * TREE.radix_log
        return digit * TREE.others + (place.z >> height) - (stand >> height)


@triton.jit
def after(stand, TREE: tl.constexpr):
    """The place of a walk after its next read."""
    if TREE.radix_log == 1:
        return stand & (stand - 1)
    else:
        return stand - (1 << tl.maximum(exponent(stand & -stand), 0) // TREE.radix_log * TREE.radix_log)


@triton.jit
def nearest(remaining):
    """The first candidate in a set of candidates given as bits; 0 when there is none."""
    return tl.maximum(exponent(remaining & -remaining), 0)


# The readers of a slot are the chunks behind it in the block of the next size: one block for each candidate.


@triton.jit
def first_reader(e, cap, TREE: tl.constexpr):
    """The candidate through which the chunk behind chunk e reads the slot of chunk e."""
    t = exponent((e + 1) & -(e + 1))
    if TREE.radix_log == 1:
        return tl.where(t < cap, t, tl.maximum(cap, t // TREE.tier * TREE.tier))
    else:
        return t // TREE.radix_log * TREE.others


@triton.jit
def count_readers(end, l, TREE: tl.constexpr):
    """The number of chunks from `end` on that read the slot which ends there, the first of them through candidate l."""
    if TREE.radix_log == 1:
        return 1 << l
    else:
        height = height_of(l, TREE)
        return (TREE.others + 1 - ((end >> height) & TREE.others)) << height


@triton.jit
def reader_at(distance, l, TREE: tl.constexpr):
    """The candidate through which a slot is read so many chunks behind its first reader, which reads it through l."""
    if TREE.radix_log == 1:
        return l
    else:
        return l + (distance >> height_of(l, TREE))


@triton.jit
def load_log_decays(log_decay, place, sizes, h, TREE: tl.constexpr):
    """log2 of the decay of each block that a chunk reads, 0 for those that it does not read and for initial ones."""
    read, end, _ = walk(place, sizes.cap, TREE)
    row = (place.c - place.z).to(tl.int64) + end - 1
    return tl.load(log_decay + row * sizes.H + h, mask=read & (end > place.z0), other=0.0)


@triton.jit
def load_channels(log_decay, place, l, sizes, h, K: tl.constexpr, BK: tl.constexpr, TREE: tl.constexpr):
    """log2 of the decays [BK] of the block that candidate l of a chunk's walk is, 0 of an initial one."""
    end, channel = end_of(place.z, l, TREE), tl.arange(0, BK)
    row = ((place.c - place.z).to(tl.int64) + end - 1) * sizes.H + h
    return tl.load(log_decay + row * K + channel, mask=channel < tl.where(end > place.z0, K, 0), other=0.0)


@triton.jit
def paths(log_decay, place, sizes, h, TREE: tl.constexpr):
    """For each candidate: is it read, and its path, log2 of the decay from the block's end to the chunk."""
    read, _, _ = walk(place, sizes.cap, TREE)
    log_block = load_log_decays(log_decay, place, sizes, h, TREE)
    return read, tl.cumsum(log_block, 0) - log_block


@triton.jit
def path_of(l, log_block, TREE: tl.constexpr):
    """The path of one candidate: log2 of the decay over the nearer blocks."""
    return tl.sum(tl.where(tl.arange(0, TREE.reads) < l, log_block, 0.0), 0)


@triton.jit
def block_row(sequence, number, sizes, h):
    """The row of a block in the states of sequences [N, M, H]."""
    return (sequence.to(tl.int64) * (sizes.cap + 1) + number) * sizes.H + h


@triton.jit
def slot_pointer(states, place, l, sizes, h, SIZE: tl.constexpr, TREE: tl.constexpr):
    """The address of the state that candidate l of a chunk's walk reads."""
    end = end_of(place.z, l, TREE)
    pointer = states.slots + (((place.c - place.z).to(tl.int64) + end - 1) * sizes.H + h) * SIZE
    if states.initial is not None:
        row = block_row(place.sequence, initial_number(place, l, sizes.cap, TREE), sizes, h)
        pointer = tl.where(end <= place.z0, states.initial + row * SIZE, pointer)
    return pointer
