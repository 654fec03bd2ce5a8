"""Every chunk reads the blocks of its past, nearest first, all chunks and heads in parallel.

    for each block on the walk:   y = X S_block        path = path + log P of the blocks between

The caller weights y: a query with lambda exp(G_i + path), a final state with exp(path) alone.
"""

# H heads of a slab, n walkers (chunks or sequence ends), C rows of X, K key, V value; m sources, w readers of each
from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from loglinear.kernels.torch.chunks import tall
from loglinear.kernels.torch.schedule import Read
from loglinear.kernels.torch.workspace import matmul, take


def walk(x: Tensor, states: Tensor, log_p: Tensor, reads: list[Read]) -> Iterator[tuple[Read, Tensor, Tensor]]:
    """Yields (read, y [H, m*w, C, V], path [H, m*w]) for x [H, n, C, K]."""
    for read, path in zip(reads, paths(x, log_p, reads), strict=True):
        yield read, read_states(x, states, read), path


def paths(x: Tensor, log_p: Tensor, reads: list[Read]) -> list[Tensor]:
    """For each read, the log decay from the end of its block to the start of its readers."""
    total = log_p.new_zeros(x.shape[:2])
    before = []
    for read in reads:
        before.append(take(total, read.readers))
        step = log_p.index_select(1, read.sources)[..., None].expand(-1, *read.readers.shape)
        total.index_add_(1, read.readers.flatten(), step.flatten(1))
    return before


def read_states(x: Tensor, states: Tensor, read: Read) -> Tensor:
    rows = tall(take(x, read.readers), read.sources)
    y = matmul(rows, take(states, read.sources).flatten(0, 1))
    return y.view(x.shape[0], read.readers.numel(), x.shape[2], -1)


def walk_backward(
    x: Tensor,
    states: Tensor,
    log_p: Tensor,
    reads: list[Read],
    pull: Callable[[Read, Tensor, Tensor], tuple[Tensor, Tensor]],
    dx: Tensor,
    dstates: Tensor,
    dlog_p: Tensor,
) -> None:
    """`pull(read, y, path)` gives (dy, dpath); adds into dx, dstates and dlog_p. Farthest blocks first: a block's
    log P stands in the path of every later read of the same walker."""
    beyond = log_p.new_zeros(x.shape[:2])
    for read, path in zip(reversed(reads), reversed(paths(x, log_p, reads)), strict=True):
        readers = read.readers.flatten()
        dy, dpath = pull(read, read_states(x, states, read), path)
        dy = tall(dy, read.sources)
        state = take(states, read.sources).flatten(0, 1)
        rows = tall(take(x, readers), read.sources)
        dstates.index_add_(1, read.sources, matmul(rows.mT, dy).unflatten(0, (x.shape[0], -1)))
        dx.index_add_(1, readers, matmul(dy, state.mT).view(x.shape[0], len(readers), *x.shape[2:]))
        passed = take(beyond, readers).unflatten(1, read.readers.shape).sum(-1)
        dlog_p.index_add_(1, read.sources, passed)
        beyond.index_add_(1, readers, dpath)
