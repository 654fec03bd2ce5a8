"""The blocks of the tree that a slice sends, and the columns that read them later: integers alone.

Buckets merge and never split. Tokens in one bucket at the end of a slice are in one bucket at every later position.
So later slices need one state for each such piece. A slice that is itself a block is one piece.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from loglinear.partition import Partition


class Tree(NamedTuple):
    """The tree of one operator."""

    partition: Partition
    chunk_size: int
    num_columns: int

    @property
    def num_blocks(self) -> int:
        """The number of block states in a state."""
        return self.partition.num_blocks(self.num_columns, self.chunk_size)

    def column(self, t: int, s: int) -> int:
        """Return the column in which position t reads position s."""
        return min(self.partition.index(t, s), self.num_columns - 1)


class Piece(NamedTuple):
    """The tokens of a slice that are in one bucket at its end."""

    number: int
    """The block that holds them in the state at the end of the slice."""
    first: int
    """The position of the oldest of them."""
    token: int
    """The position of the newest of them."""


class Run(NamedTuple):
    """Consecutive tokens that read the states from before their slice in the same columns."""

    length: int
    columns: tuple[int, ...]
    """One for each of these states."""


@lru_cache(maxsize=1024)
def pieces(start: int, end: int, tree: Tree) -> tuple[Piece, ...]:
    """Return the pieces of positions start to end - 1 of a document, nearest first; both are multiples of a chunk.

    Examples:
        >>> pieces(8, 16, Tree(Partition(), chunk_size=2, num_columns=9))
        (Piece(number=3, first=8, token=15),)
        >>> pieces(6, 12, Tree(Partition(), chunk_size=2, num_columns=9))
        (Piece(number=1, first=8, token=11), Piece(number=2, first=6, token=7))
    """
    partition, C, first = tree.partition, tree.chunk_size, tree.partition.first_column(tree.chunk_size)
    found: dict[int, Piece] = {}
    for block in partition.walk(end // C, C):
        if block.end * C <= start:
            break
        number, oldest = min(block.column - first, tree.num_blocks - 1), max((block.end - block.size) * C, start)
        token = found[number].token if number in found else block.end * C - 1
        found[number] = Piece(number, oldest, token)
    return tuple(found.values())


@lru_cache(maxsize=1024)
def runs(start: int, end: int, tokens: tuple[int, ...], tree: Tree) -> tuple[Run, ...]:
    """Return the runs of positions start to end - 1, a multiple of a chunk first, that read older `tokens`.

    Examples:
        >>> for run in runs(8, 20, (7, 3), Tree(Partition(), chunk_size=2, num_columns=9)):
        ...     print(run)
        Run(length=8, columns=(4, 4))
        Run(length=4, columns=(5, 5))
    """
    partition, C = tree.partition, tree.chunk_size
    found: list[Run] = []
    z, last = start // C, -(-end // C)
    while z < last:
        # The nearest block that reaches back beyond `start` is the smallest one; a column changes at its multiples.
        size = next(block.size for block in partition.walk(z, C) if (block.end - block.size) * C < start)
        following = min(last, (z // size + 1) * size)
        columns = tuple(tree.column(z * C, token) for token in tokens)
        length = min(end, following * C) - z * C
        if found and found[-1].columns == columns:
            found[-1] = Run(found[-1].length + length, columns)
        else:
            found.append(Run(length, columns))
        z = following
    return tuple(found)
