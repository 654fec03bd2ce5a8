"""Every chunk reads the blocks of its past, nearest first, all chunks and heads in parallel.

    for each block on the walk:   y = X S_block        X = X P_block

The caller weights y: a query (X = Qh) with lambda, a final state (X = I) with 1.
"""

# H heads of a slab, n walkers (chunks or sequence ends), C rows of X, K key, V value; m sources, w readers of each
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from loglinear.kernels.torch.chunks import tall
from loglinear.kernels.torch.schedule import Read
from loglinear.kernels.torch.workspace import empty, matmul, take, zeros


def walk(x: Tensor, slots: Tensor, reads: list[Read]) -> Iterator[tuple[Read, Tensor, None]]:
    """Yields (read, y [H, m*w, C, V], None: y lacks no factor) and turns x [H, n, C, K], in place, into what the next
    block meets."""
    K = x.shape[-1]
    for read in reads:
        readers = read.readers.flatten()
        rows = tall(take(x, readers), read.sources)
        both = matmul(rows, take(slots, read.sources).flatten(0, 1))
        both = both.view(x.shape[0], len(readers), x.shape[2], -1)
        x.index_copy_(1, readers, both[..., :K])
        yield read, both[..., K:], None


def walk_backward(
    x: Tensor,
    slots: Tensor,
    turns: list[list[Read]],
    pull: Callable[[Read, Tensor], Tensor],
    dslots: Tensor,
) -> Tensor:
    """`pull(read, y)` gives dy; returns dX and adds into dslots."""
    K = x.shape[-1]
    dx = zeros(x, *x.shape)
    current = empty(x, *x.shape).copy_(x)
    transitions = empty(slots, *slots.shape[:-1], K).copy_(slots[..., :K])  # rows of a part of the slots cost all rows
    for reads in turns:
        _walk_backward(current, transitions, slots, reads, pull, dx, dslots)
    return dx


def _walk_backward(
    x: Tensor,
    transitions: Tensor,
    slots: Tensor,
    reads: list[Read],
    pull: Callable[[Read, Tensor], Tensor],
    dx: Tensor,
    dslots: Tensor,
) -> None:
    """One turn: a first pass keeps the X that each block met, the second goes back from the farthest block."""
    K = x.shape[-1]
    met = []
    for read in reads:
        met.append(take(x, read.readers))
        rows = tall(met[-1], read.sources)
        after = matmul(rows, take(transitions, read.sources).flatten(0, 1))
        x.index_copy_(1, read.readers.flatten(), after.view_as(met[-1]))
    for read, before in zip(reversed(reads), reversed(met), strict=True):
        readers = read.readers.flatten()
        slot = take(slots, read.sources).flatten(0, 1)
        rows = tall(before, read.sources)
        y = matmul(rows, slot[..., K:]).view(*before.shape[:-1], -1)
        dboth = tall(torch.cat([take(dx, readers), pull(read, y)], -1), read.sources)
        dslots.index_add_(1, read.sources, matmul(rows.mT, dboth).unflatten(0, (x.shape[0], -1)))
        dx.index_copy_(1, readers, matmul(dboth, slot.mT).view_as(before))
