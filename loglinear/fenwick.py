"""The Fenwick partition of the past, in integers alone.

A query at position ``t`` sees every earlier position ``s`` through one bucket, and the bucket's number is its level:

    level(t, s) = bit_length(t XOR s)

so level 0 is the token itself and level ``l >= 1`` holds up to ``2**(l - 1)`` tokens. The same rule holds one storey
higher: between chunks of ``C`` tokens the level is ``log2(C) + level(t // C, s // C)``.

The past of chunk ``z`` (the chunks ``0 .. z - 1``) is one aligned block per set bit of ``z``, the layout of a binary
indexed tree (Fenwick 1994): the block that ends at chunk ``e`` (exclusive) has ``e & -e`` chunks.

Source: Guo, Yang, Goel, Xing, Dao, Kim, "Log-Linear Attention", arXiv 2506.04761, section 3.
"""

from __future__ import annotations


def level(t: int, s: int) -> int:
    """The level at which position ``t`` sees position ``s <= t``.

    Examples:
        >>> [level(6, s) for s in range(7)]
        [3, 3, 3, 3, 2, 2, 0]
        >>> [level(7, s) for s in range(8)]
        [3, 3, 3, 3, 2, 2, 1, 0]
    """
    return (t ^ s).bit_length()


def num_levels(length: int) -> int:
    """How many different levels a sequence of ``length`` tokens uses.

    Examples:
        >>> [num_levels(length) for length in (1, 2, 3, 4, 5, 16_384)]
        [1, 2, 3, 3, 4, 15]
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    return (length - 1).bit_length() + 1


MOST_LEVELS = num_levels(2**63)  # that positions in int64 tell apart: more of them could never be read


def merge_height(t: int) -> int:
    """The number of trailing zeros of ``t >= 1``: at step ``t`` the levels ``0 .. merge_height(t)`` join into the next.

    Examples:
        >>> [merge_height(t) for t in range(1, 9)]
        [0, 1, 0, 2, 0, 1, 0, 3]
    """
    return (t & -t).bit_length() - 1


def walk(z: int) -> list[tuple[int, int]]:
    """The blocks that make up the chunks before ``z``, nearest first, as (exclusive end, log2 of the size).

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
    """log2 of the block size, in chunks, from which on all blocks share the last level ``num_levels - 1``.

    Levels clamp: ``min(level(t, s), num_levels - 1)``. Blocks below the cap keep a level of their own; everything
    older is one prefix. With cap 0 nothing is left of the tree, and the model is the linear one times one lambda.

    Examples:
        >>> block_cap(15, 64), block_cap(8, 64), block_cap(1, 64)
        (7, 0, 0)
    """
    return max(0, num_levels - 2 - log2(chunk_size))


def num_blocks(num_levels: int, chunk_size: int) -> int:
    """How many block states a decoding state holds: one per size below the cap, and the prefix.

    Examples:
        >>> num_blocks(15, 64), num_blocks(1, 64)
        (8, 1)
    """
    return block_cap(num_levels, chunk_size) + 1


def has_block(chunks: int, size: int, cap: int) -> bool:
    """Return True if the past of ``chunks`` chunks has a block of ``2**size``; at the cap it is the whole older prefix.

    Examples:
        >>> [has_block(13, size, cap=2) for size in range(3)]
        [True, False, True]
    """
    return chunks >> size > 0 if size == cap else chunks >> size & 1 == 1


def block_level(size: int, num_levels: int, chunk_size: int) -> int:
    """The level of a whole block of ``2**size`` chunks, clamped to the last.

    Examples:
        >>> [block_level(size, num_levels=9, chunk_size=64) for size in range(4)]
        [7, 8, 8, 8]
    """
    return min(log2(chunk_size) + 1 + size, num_levels - 1)


def log2(power: int) -> int:
    """The exponent of a power of two.

    Examples:
        >>> log2(64)
        6
    """
    if power < 1 or power & (power - 1):
        raise ValueError(f"expected a power of two, got {power}")
    return power.bit_length() - 1
