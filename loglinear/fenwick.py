"""The Fenwick partition of the past, in plain integers.

Position ``t`` reads every earlier position ``s`` through one bucket. The bucket's number is its level:

    level(t, s) = bit_length(t XOR s)

Level 0 is the token itself, and level ``l >= 1`` holds up to ``2**(l - 1)`` tokens. Between different chunks of ``C``
tokens the same rule gives ``level(t, s) = log2(C) + level(t // C, s // C)``.

The past of chunk ``z`` (the chunks ``0 .. z - 1``) is one aligned block per set bit of ``z``. This is the layout of a
binary indexed tree (Fenwick 1994): the block that ends at chunk ``e`` (exclusive) has ``e & -e`` chunks.

Source: Guo, Yang, Goel, Xing, Dao, Kim, "Log-Linear Attention", arXiv 2506.04761, section 3.
"""

from __future__ import annotations


def level(t: int, s: int) -> int:
    """Return the level at which position ``t`` reads position ``s <= t``.

    Examples:
        >>> [level(6, s) for s in range(7)]
        [3, 3, 3, 3, 2, 2, 0]
        >>> [level(7, s) for s in range(8)]
        [3, 3, 3, 3, 2, 2, 1, 0]
    """
    return (t ^ s).bit_length()


def num_levels(length: int) -> int:
    """Return the number of different levels that a sequence of ``length`` tokens uses.

    Examples:
        >>> [num_levels(length) for length in (1, 2, 3, 4, 5, 16_384)]
        [1, 2, 3, 3, 4, 15]

    Raises:
        ValueError: ``length`` is less than 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    return (length - 1).bit_length() + 1


MOST_LEVELS = num_levels(2**63)  # int64 positions distinguish no more levels


def merge_height(t: int) -> int:
    """Return the number of trailing zeros of ``t >= 1``.

    At step ``t`` the levels ``0 .. merge_height(t)`` merge into the next level.

    Examples:
        >>> [merge_height(t) for t in range(1, 9)]
        [0, 1, 0, 2, 0, 1, 0, 3]
    """
    return (t & -t).bit_length() - 1


def walk(z: int) -> list[tuple[int, int]]:
    """Return the blocks that make up the chunks before ``z``, nearest first, as (exclusive end, log2 of the size).

    Examples:
        >>> walk(6)
        [(6, 1), (4, 2)]
        >>> [end - (1 << size) for end, size in walk(13)]
        [12, 8, 0]
    """
    blocks = []
    while z > 0:
        blocks.append((z, merge_height(z)))
        z &= z - 1
    return blocks


def block_cap(num_levels: int, chunk_size: int) -> int:
    """Return log2 of the block size, in chunks, from which on all blocks share the last level ``num_levels - 1``.

    Levels are capped: ``min(level(t, s), num_levels - 1)``. Each block below the cap has its own level, and everything
    older is one prefix. With cap 0 all blocks share the last level, so every chunk reads its past as one prefix.

    Examples:
        >>> block_cap(15, 64), block_cap(8, 64), block_cap(1, 64)
        (7, 0, 0)
    """
    return max(0, num_levels - 2 - log2(chunk_size))


def num_blocks(num_levels: int, chunk_size: int) -> int:
    """Return the number of block states in a decoding state: one per size below the cap, and the prefix.

    Examples:
        >>> num_blocks(15, 64), num_blocks(1, 64)
        (8, 1)
    """
    return block_cap(num_levels, chunk_size) + 1


def log2(power: int) -> int:
    """Return the exponent of a power of two.

    Examples:
        >>> log2(64)
        6

    Raises:
        ValueError: ``power`` is not a power of two.
    """
    if power < 1 or power & (power - 1):
        raise ValueError(f"expected a power of two, got {power}")
    return power.bit_length() - 1
