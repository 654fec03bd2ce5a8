"""The radix-r partition of the past, in plain integers; radix 2 is the Fenwick partition of `loglinear.fenwick`.

Position ``t`` reads every earlier position ``s`` through one bucket. Tokens lie in aligned blocks of ``f`` tokens, the
finest blocks. The blocks of ``t`` and ``s`` have numbers in base ``r``. The highest digit that differs is ``p``:

    index(t, s) = 0                                      if t // f == s // f
    index(t, s) = 1 + p (r - 1) + (t_p - s_p - 1)        otherwise

The index is the column of ``level_scales`` that weights the read. Column 0 is the unfinished finest block, with the
token itself. Column ``1 + p (r - 1) + d`` is one whole block of ``f r**p`` tokens. Between it and the token's own
block of this size lie ``d`` others. The index grows with age, so ``L`` columns clamp it, ``min(index(t, s), L - 1)``:
the last column is one bucket with everything older.

A largest block of ``f r**c`` tokens ends the growth. Older blocks of this size stay apart, one column for each, and
their number grows with the sequence. So the number of columns alone decides which tokens are one prefix. The largest
block alone decides how coarse the columns before that prefix may be.

A chunk is a block too: ``C = f r**j`` tokens. The past of chunk ``z`` is ``z_p`` blocks of ``r**p`` chunks for every
base-r digit ``z_p`` of ``z``. One array with one state per chunk holds all of them: slot ``e`` is the largest whole
block that ends with chunk ``e``.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from loglinear.fenwick import log2

LARGEST_CHUNK = 4096  # tokens; the scores of a chunk grow with the square of them


class Height(NamedTuple):
    """The blocks of one size: one digit of a chunk's number."""

    size: int
    """The number of chunks in a block."""
    radix: int
    """The number of blocks that join into one of the next size."""
    column: int
    """The column of the nearest block; the next older one has the next column."""


class Block(NamedTuple):
    """One block on the walk of a chunk over its past."""

    end: int
    """The number of the chunk after its last one."""
    size: int
    """The number of its chunks."""
    column: int
    """The column of `level_scales` that weights it, before clamping."""


@dataclass(frozen=True)
class Partition:
    """The rule that assigns past tokens to buckets.

    Attributes:
        radix: r, the number of blocks that join into one: a power of two, at least 2.
        finest_block: f, the tokens of the smallest block: a power of two. Column 0 is the part of its own finest block
            that a token sees.
        largest_block: The tokens of the largest block: finest_block times a power of radix. Older blocks of this size
            stay apart. None: blocks grow without limit.

    Raises:
        ValueError: A number that does not fit; the message names it.

    Examples:
        >>> Partition(radix=16, finest_block=64, largest_block=1024)
        Partition(radix=16, finest_block=64, largest_block=1024)
        >>> Partition(radix=3)
        Traceback (most recent call last):
        ValueError: radix must be a power of two of at least 2, got 3
    """

    radix: int = 2
    finest_block: int = 1
    largest_block: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("radix", 2), ("finest_block", 1)):
            object.__setattr__(self, name, _power_of_two(name, getattr(self, name), least))
        if self.largest_block is None:
            return
        largest = _power_of_two("largest_block", self.largest_block, 1)
        if largest < self.finest_block or (log2(largest) - log2(self.finest_block)) % log2(self.radix):
            raise ValueError(
                f"largest_block must be finest_block = {self.finest_block} times a power of radix = {self.radix}, "
                f"got {largest}"
            )
        object.__setattr__(self, "largest_block", largest)

    def index(self, t: int, s: int) -> int:
        """Return the column in which position ``t`` reads position ``s <= t``, before clamping.

        Examples:
            >>> [Partition(radix=4).index(22, s) for s in range(23)]
            [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 4, 4, 4, 4, 2, 1, 0]
            >>> [Partition(radix=4, finest_block=4).index(22, s) for s in range(23)]
            [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1, 1, 1, 1, 0, 0, 0]
            >>> [Partition(radix=4, largest_block=4).index(22, s) for s in range(23)]
            [8, 8, 8, 8, 7, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 4, 4, 4, 4, 2, 1, 0]
        """
        a, b, p = t // self.finest_block, s // self.finest_block, 0
        last = self.last_digit(self.finest_block)
        while a // self.radix != b // self.radix and p != last:
            a, b, p = a // self.radix, b // self.radix, p + 1
        return p * (self.radix - 1) + a - b

    def num_columns(self, length: int) -> int:
        """Return the number of columns that a sequence of ``length`` tokens uses without clamping.

        Examples:
            >>> [Partition().num_columns(length) for length in (1, 2, 3, 16_384)]
            [1, 2, 3, 15]
            >>> [Partition(16, 64).num_columns(length) for length in (64, 128, 1024, 4096, 65_536)]
            [1, 2, 16, 19, 34]
            >>> Partition(16, 64, largest_block=1024).num_columns(65_536)
            79

        Raises:
            ValueError: ``length`` is less than 1.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        return self.index(length - 1, 0) + 1

    def buckets(self, t: int, num_columns: int) -> list[range]:
        """Return the positions that position ``t`` reads in each of ``num_columns`` columns.

        Examples:
            >>> Partition(radix=4, finest_block=4).buckets(t=22, num_columns=6)
            [range(20, 23), range(16, 20), range(0, 0), range(0, 0), range(0, 16), range(0, 0)]
            >>> Partition().buckets(t=13, num_columns=3)
            [range(13, 14), range(12, 13), range(0, 12)]

        Raises:
            ValueError: ``t`` is negative, or there are fewer than 1 column.
        """
        for name, value, least in (("t", t, 0), ("num_columns", num_columns, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        f, found = self.finest_block, [range(0)] * num_columns
        own = Block(end=t // f + 1, size=1, column=0)
        for block in (own, *self.walk(t // f, chunk_size=f)):
            column, start = min(block.column, num_columns - 1), (block.end - block.size) * f
            found[column] = range(start, found[column].stop or min(block.end * f, t + 1))
        return found

    def next_columns(self, t: int, num_columns: int) -> list[int]:
        """Return for every column at position ``t - 1`` the column of the same tokens at position ``t``.

        The new token itself is in column 0.

        Examples:
            >>> [Partition().next_columns(t, 5) for t in (1, 2, 4)]
            [[1, 2, 2, 3, 4], [2, 2, 3, 3, 4], [3, 3, 3, 4, 4]]
            >>> [Partition(radix=4).next_columns(t, 6) for t in (3, 4)]
            [[1, 2, 3, 4, 4, 5], [4, 4, 4, 4, 5, 5]]
        """
        if t == 0 or t % self.finest_block:
            return list(range(num_columns))
        b, p, last = t // self.finest_block, 0, self.last_digit(self.finest_block)
        while b % self.radix == 0 and p != last:
            b, p = b // self.radix, p + 1
        first = 1 + p * (self.radix - 1)  # the column of the block that is now whole
        behind = num_columns if p == last else first + self.radix - 1
        moved = [first if c < first else c + 1 if c < behind else c for c in range(num_columns)]
        return [min(c, num_columns - 1) for c in moved]

    def heights(self, chunk_size: int, chunks: int) -> list[Height]:
        """Return the sizes of blocks in a sequence of ``chunks`` chunks, smallest first.

        Examples:
            >>> for height in Partition(4).heights(chunk_size=4, chunks=40):
            ...     print(height)
            Height(size=1, radix=4, column=4)
            Height(size=4, radix=4, column=7)
            Height(size=16, radix=4, column=10)
            >>> Partition(4, largest_block=16).heights(chunk_size=4, chunks=40)[-1]
            Height(size=4, radix=11, column=7)

        Raises:
            ValueError: ``chunk_size`` is not the size of a block.
        """
        self.check_chunk_size(chunk_size)
        last, column = self.last_digit(chunk_size), self.first_column(chunk_size)
        found: list[Height] = []
        size = 1
        while size <= chunks:
            if len(found) == last:
                found.append(Height(size, chunks // size + 1, column))  # more blocks than there are, so they never join
                break
            found.append(Height(size, self.radix, column))
            size, column = size * self.radix, column + self.radix - 1
        return found

    def walk(self, z: int, chunk_size: int) -> list[Block]:
        """Return the blocks that make up the chunks before chunk ``z``, nearest first.

        Examples:
            >>> for block in Partition(radix=4, finest_block=16).walk(z=22, chunk_size=16):
            ...     print(block)
            Block(end=22, size=1, column=1)
            Block(end=21, size=1, column=2)
            Block(end=20, size=4, column=4)
            Block(end=16, size=16, column=7)
            >>> [end - size for end, size, column in Partition().walk(13, chunk_size=64)]
            [12, 8, 0]
        """
        return [
            Block((z // size - d) * size, size, column + d)
            for size, radix, column in self.heights(chunk_size, z)
            for d in range(z // size % radix)
        ]

    @property
    def numbers(self) -> list[int]:
        """The arguments that make an equal partition. Without a largest block there are two, otherwise three."""
        return [self.radix, self.finest_block, *([] if self.largest_block is None else [self.largest_block])]

    @classmethod
    def of(cls, numbers: list[int]) -> Partition:
        """Return the partition of these `numbers`; symbolic ones of a compiled graph become constants of it."""
        return _partition(*map(int, numbers))

    def chunk_near(self, chunk_size: int, most: int) -> int:
        """Return the block size whose ratio to ``chunk_size`` is nearest to 1.

        Only the finest block may have more than ``most`` tokens.

        Examples:
            >>> [Partition(radix).chunk_near(64, most=4096) for radix in (2, 4, 16, 32, 128)]
            [64, 64, 16, 32, 128]
            >>> [Partition(16, finest_block).chunk_near(64, most=4096) for finest_block in (4, 16, 64, 256)]
            [64, 16, 64, 256]
        """
        nearest, *larger = self._block_sizes(most)
        for size in larger:  # torch.compile traces neither min nor sorted with a key
            if max(size, chunk_size) * min(nearest, chunk_size) < max(nearest, chunk_size) * min(size, chunk_size):
                nearest = size
        return nearest

    def check_chunk_size(self, chunk_size: int) -> None:
        """Raise ValueError unless a chunk of this size is a block."""
        if chunk_size not in self._block_sizes(chunk_size):
            raise ValueError(f"chunk_size must be the size of a block of {self}, got {chunk_size}")

    def _block_sizes(self, most: int) -> list[int]:
        """Return the sizes in tokens: the finest block, and all larger ones of at most `most` tokens."""
        sizes = [self.finest_block]
        while sizes[-1] * self.radix <= min(most, self.largest_block or most):
            sizes.append(sizes[-1] * self.radix)
        return sizes

    def last_digit(self, chunk_size: int) -> int | None:
        """Return which digit of a chunk's number counts the largest blocks; None without a largest block.

        Examples:
            >>> Partition(4, largest_block=256).last_digit(chunk_size=16), Partition().last_digit(chunk_size=16)
            (2, None)
        """
        if self.largest_block is None:
            return None
        return (log2(self.largest_block) - log2(chunk_size)) // log2(self.radix)

    def first_column(self, chunk_size: int) -> int:
        """Return the column of the nearest chunk.

        Examples:
            >>> Partition().first_column(64), Partition(16, 64).first_column(64), Partition(4).first_column(64)
            (7, 1, 10)
        """
        return 1 + (log2(chunk_size) - log2(self.finest_block)) // log2(self.radix) * (self.radix - 1)

    def num_blocks(self, num_columns: int, chunk_size: int) -> int:
        """Return the number of block states in a decoding state: one for each column of chunks, at least one.

        The last one is everything older.

        Examples:
            >>> Partition().num_blocks(15, 64), Partition(16, 64).num_blocks(32, 64), Partition().num_blocks(1, 64)
            (8, 31, 1)
        """
        return max(1, num_columns - self.first_column(chunk_size))

    def block_column(self, number: int, num_columns: int, chunk_size: int) -> int:
        """Return the column of a block state, at most ``num_columns - 1``."""
        return min(self.first_column(chunk_size) + number, num_columns - 1)

    def has_block(self, chunks: int, number: int, num_blocks: int, chunk_size: int) -> bool:
        """Return True if the past of ``chunks`` chunks has block ``number``; the last block is everything older.

        Examples:
            >>> [Partition(4, 16).has_block(11, number, num_blocks=5, chunk_size=16) for number in range(5)]
            [True, True, True, True, True]
            >>> [Partition(4, 16).has_block(17, number, num_blocks=5, chunk_size=16) for number in range(5)]
            [True, False, False, False, True]
        """
        last = self.last_digit(chunk_size)
        p = number // (self.radix - 1) if last is None else min(number // (self.radix - 1), last)
        left, nearer = chunks // self.radix**p, number - p * (self.radix - 1)
        is_open = number == num_blocks - 1 or p == last  # it may reach beyond its digit
        return (left if is_open else left % self.radix) > nearer


def _power_of_two(name: str, value: object, least: int) -> int:
    """Return an integer of Python or numpy as an int; ValueError unless it is a power of two of at least `least`."""
    is_whole = isinstance(value, int | numbers.Integral) and not isinstance(value, bool)
    if not is_whole or int(value) < least or int(value) & (int(value) - 1):  # type: ignore[call-overload]
        raise ValueError(f"{name} must be a power of two of at least {least}, got {value!r}")
    return int(value)  # type: ignore[call-overload]


_partition = lru_cache(Partition)

FENWICK = Partition()
"""Radix 2 without a finest or a largest block: the published partition, index(t, s) = bit_length(t XOR s)."""
