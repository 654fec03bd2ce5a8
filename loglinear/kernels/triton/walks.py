"""Which blocks a chunk reads, on the device: candidates, decays on the way to them, and where their states lie."""

# l candidate read, z chunk number in its sequence, z0 its first chunk, e exclusive end of a block in chunks
import triton
import triton.language as tl

from loglinear.kernels.triton import layout
from loglinear.kernels.triton.tiles import STOREY, exponent

READS = tl.constexpr(layout.READS)  # candidate reads of a walk: levels between chunks


@triton.jit
def walk(z, z0, cap):
    """The reads of chunk z as vectors over READS candidates: is it read, exclusive end of the block, is it a node.

    Below the cap candidate l is the block of 2**l chunks, read where bit l of z is set. The older past is one slot for
    each storey: candidate max(cap, STOREY s) stands for the rest of storey s. Blocks that end at or before z0, where a
    continued sequence begins, are nodes: they come from the initial state, the oldest with the whole prefix in it.
    """
    l, oldest = tl.arange(0, READS), tl.minimum(cap, 31)
    digit = tl.where(l < cap, 1, (1 << ((l // STOREY + 1) * STOREY - l)) - 1) & (z >> l)
    is_first = (l <= cap) | (l % STOREY == 0)
    end = (z >> l) << l
    is_node = end <= z0
    read = is_first & (digit > 0) & ((end > z0) | (l < cap) | (end == (z0 >> oldest) << oldest))
    return read, end, is_node


@triton.jit
def reader_level(e, cap):
    """The candidate through which the readers of the slot of chunk e see it; they are the 2**l chunks behind it."""
    t = exponent((e + 1) & -(e + 1))
    return tl.where(t < cap, t, tl.maximum(cap, t // STOREY * STOREY))


@triton.jit
def load_blocks(log_p, c, z, z0, cap, h, H):
    """log2 of the decay of each block that chunk z reads, 0 for what it does not read and for nodes."""
    read, end, is_node = walk(z, z0, cap)
    row = (c - z).to(tl.int64) + end - 1
    return tl.load(log_p + row * H + h, mask=read & (end > z0), other=0.0)


@triton.jit
def paths(log_p, c, z, z0, cap, h, H):
    """For each candidate: is it read, and its path, log2 of the decay from the block's end to chunk z."""
    read, _, _ = walk(z, z0, cap)
    log_block = load_blocks(log_p, c, z, z0, cap, h, H)
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
def slot_pointer(slots, nodes, c, z, z0, sequence, l, cap, h, H, SIZE: tl.constexpr, NODES: tl.constexpr):
    """Where the state lies that candidate l of chunk z's walk reads."""
    end = (z >> l) << l
    pointer = slots + (((c - z).to(tl.int64) + end - 1) * H + h) * SIZE
    if NODES:
        m = tl.minimum(l, cap)
        node = nodes + ((sequence.to(tl.int64) * (cap + 1) + m) * H + h) * SIZE
        pointer = tl.where(end <= z0, node, pointer)
    return pointer
