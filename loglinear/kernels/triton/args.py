"""The arguments of the kernels: named tuples, which the host builds once and every launch of a call reuses.

In a kernel the fields keep their names. A field that is None is a compile-time constant there.
"""

# B batch, T time, G groups, H heads, K key, V value, L levels, C chunk
from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """A tensor [B, T, heads, ...]: its numbers, and the strides of its first three axes."""

    data: Tensor
    b: int
    t: int
    h: int

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        return cls(x, *x.stride()[:3])


class Tokens(NamedTuple):
    """One token of every row, [N, heads, ...]: their numbers, and the strides of the first two axes."""

    data: Tensor
    n: int
    h: int

    @classmethod
    def of(cls, x: Tensor) -> Tokens:
        return cls(x, *x.stride()[:2])


class DecodeState(NamedTuple):
    """The arrays of a `loglinear.ops.DecodeState`: states of the scalar gate have no beta and no inverse."""

    position: Tensor  # [N] int64
    blocks: Tensor  # [N, M, H, K, V]
    k: Tensor  # [N, C, G, K], the keys of the unfinished chunk, and so on
    v: Tensor
    decay: Tensor
    beta: Tensor | None
    inverse: Tensor | None


class Slab(NamedTuple):
    """Some heads of a contiguous tensor [B, T, heads, ...] that a kernel writes: numbers, and the stride of a token."""

    data: Tensor
    t: int

    @classmethod
    def of(cls, x: Tensor) -> Slab:
        return cls(x, x.stride(1))


class Planes(NamedTuple):
    """An array with a plane for each share of a group's heads, and the stride of a plane."""

    data: Tensor
    plane: int

    @classmethod
    def of(cls, x: Tensor) -> Planes:
        return cls(x, x.stride(0))


class Sizes(NamedTuple):
    """The sizes that vary from call to call; one compiled kernel serves all of them.

    A kernel takes them one by one and builds the tuple again: Triton specialises the numbers in a tuple, for 1 and for
    multiples of 16, and would compile a kernel for each.
    """

    T: int  # tokens of a row of the batch
    N: int  # chunks of a row
    H: int
    R: int  # heads of a group
    L: int
    cap: int  # the number of the last block of a state, which is all that is older than the others


# Arguments of kernels that are never specialised.
SIZES = [*Sizes._fields, "tier", "is_top"]


class Math(NamedTuple):
    """The numbers that the matrix units multiply, and their precision: a compile-time constant."""

    dot: tl.dtype
    precision: str


class Place(NamedTuple):
    """The place of a chunk in the walk: its row in every per-chunk array, its number in its sequence, the number of the
    sequence's first chunk, and the sequence."""

    c: tl.tensor
    z: tl.tensor
    z0: tl.tensor
    sequence: tl.tensor


class Chunk(NamedTuple):
    """A `Place` with its tokens: the row of the batch, the first token, how many, and the end of the sequence."""

    c: tl.tensor
    z: tl.tensor
    z0: tl.tensor
    sequence: tl.tensor
    b: tl.tensor
    first: tl.tensor
    n: tl.tensor
    end: tl.tensor


class Part(NamedTuple):
    """The share of one program: the tokens of a chunk or of one half of it, and some heads of one group."""

    split: tl.tensor  # the share's number among those of the group
    group: tl.tensor
    head: tl.tensor  # the first of `heads`
    heads: tl.tensor
    half: tl.tensor
    chunk: Chunk


class Run(NamedTuple):
    """A run of entries: the row of its sequence's chunk 0, the sequence's chunks, the run's number, z0, sequence."""

    origin: tl.tensor
    count: tl.tensor
    number: tl.tensor
    z0: tl.tensor
    sequence: tl.tensor
