"""The partition of the past as the kernels take it.

The candidates of a chunk's walk have numbers, those of their columns from the nearest chunk's on. Candidate
l = p (r - 1) + d is the block of r**p chunks behind d others of its size. With radix 2 it is the block of 2**l chunks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from loglinear.fenwick import log2
from loglinear.partition import Partition

LEVELS = 16  # binary levels between chunks that a walk can read
MAX_CHUNKS = 1 << LEVELS
SWEEP_LEVELS = 6  # binary levels that one sweep builds at most: 64 entries are one tile
MAX_RADIX = 1 << SWEEP_LEVELS  # a sweep builds whole digits


class Tree(NamedTuple):
    """A partition at one chunk size: a compile-time constant."""

    radix_log: int
    others: int  # blocks of one size before they join, less one: r - 1
    finest_log: int  # of the tokens in a finest block
    column: int  # of the nearest chunk; the columns of the chunk itself are before it
    tier: int  # binary levels of a tier, 2**tier entries of which are a run: as many digits as fit
    run_read: int  # the first candidate whose block is at least a whole run
    reads: int  # the width of the arrays of candidates, a power of two

    @classmethod
    @lru_cache
    def of(cls, partition: Partition, chunk_size: int, levels: int = SWEEP_LEVELS) -> Tree:
        """A tier has at most so many levels, but at least one digit."""
        m = log2(partition.radix)
        digits = max(1, levels // m)
        reads = 1 << (candidates(m, MAX_CHUNKS - 1) - 1).bit_length()
        column = partition.first_column(chunk_size)
        others = partition.radix - 1
        return cls(m, others, log2(partition.finest_block), column, digits * m, digits * others, reads)

    def has_prefix(self, z: Tensor, cap: int) -> Tensor:
        """Does the last block of a state, number cap, have chunks before chunk z? [N] bool."""
        return z >> min(cap // self.others * self.radix_log, 31) > cap % self.others


class StateTree(NamedTuple):
    """The blocks of a decoding state: a compile-time constant of its steps."""

    radix_log: int
    others: int  # as in `Tree`, and so are the next two
    finest_log: int
    column: int
    blocks: int  # M
    last: int  # the digit that counts the largest blocks; beyond all digits where blocks grow without limit
    largest_log: int  # log2 of the chunks of the largest block that others join
    is_queue: bool  # can there be several blocks of one size?

    @classmethod
    @lru_cache
    def of(cls, partition: Partition, chunk_size: int, blocks: int) -> StateTree:
        """`blocks` is M; the last one is everything older."""
        m, others, last = log2(partition.radix), partition.radix - 1, partition.last_digit(chunk_size)
        last = blocks if last is None else min(last, blocks)
        largest_log = min(m * min(last, -(-(blocks - 1) // others)), 62)  # positions are below 2**62
        column = partition.first_column(chunk_size)
        is_queue = others > 1 or last < blocks
        return cls(m, others, log2(partition.finest_block), column, blocks, last, largest_log, is_queue)


def candidates(radix_log: int, z: int) -> int:
    """Return how many candidates the walks of the chunks up to chunk z have.

    Examples:
        >>> [candidates(1, z) for z in (0, 1, 2, 13)], [candidates(2, z) for z in (0, 1, 3, 4, 13)]
        ([0, 1, 2, 4], [0, 1, 3, 4, 6])
    """
    digit = max(0, z.bit_length() - 1) // radix_log
    return digit * ((1 << radix_log) - 1) + (z >> digit * radix_log)
