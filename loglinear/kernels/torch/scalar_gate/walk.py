"""Every chunk reads the blocks of its past, nearest first, all chunks and heads in parallel.

    for each block on the walk:   y = (X exp(path)) S_block        path = path + log P of the blocks between

X are the queries from the chunk's start on, diag(exp(G)) Q, or I for a final state. A diagonal gate has a path for each
channel of X. A scalar gate has one number for all of X: the caller multiplies it into the weight of y. That weight is
lambda for a query and 1 for a final state.
"""

# H heads of a slab, n walkers (chunks or sequence ends), C rows of X, K key, V value, D decays; m sources, w readers
from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from loglinear.kernels.torch.chunks import tall
from loglinear.kernels.torch.gate import of_gate
from loglinear.kernels.torch.schedule import Read
from loglinear.kernels.torch.workspace import matmul, product, take, zeros


def walk(x: Tensor, states: Tensor, log_p: Tensor, reads: list[Read]) -> Iterator[tuple[Read, Tensor, Tensor | None]]:
    """Yields (read, y [H, m*w, C, V], the factor [H, m*w, 1] that y lacks) for x [H, n, C, K]."""
    for read, path in zip(reads, paths(x, log_p, reads), strict=True):
        rows, decay = decayed(take(x, read.readers), path)
        y = matmul(tall(rows, read.sources), take(states, read.sources).flatten(0, 1))
        yield read, y.view(*rows.shape[:-1], -1), decay


def decayed(rows: Tensor, path: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows [H, r, C, K] with the decay of a path [H, r, D] in place, and the decay [H, r, 1] that they lack."""
    decay = path.exp_()
    return (rows, decay) if decay.shape[-1] == 1 else (rows.mul_(decay[:, :, None]), None)


def paths(x: Tensor, log_p: Tensor, reads: list[Read]) -> list[Tensor]:
    """For each read, the log decay [H, m*w, D] from the end of its block to the start of its readers."""
    total = log_p.new_zeros(*x.shape[:2], log_p.shape[-1])
    before = []
    for read in reads:
        before.append(take(total, read.readers))
        step = log_p.index_select(1, read.sources)[:, :, None].expand(-1, *read.readers.shape, -1)
        total.index_add_(1, read.readers.flatten(), step.flatten(1, 2))
    return before


def walk_backward(
    x: Tensor,
    states: Tensor,
    log_p: Tensor,
    reads: list[Read],
    pull: Callable[[Read, Tensor, Tensor | None], Tensor],
    dstates: Tensor,
    dlog_p: Tensor,
) -> Tensor:
    """`pull(read, y, decay)` gives dy; returns dX and adds into dstates and dlog_p. Farthest blocks first: a
    block's log P stands in the path of every later read of the same walker."""
    dx, beyond = zeros(x, *x.shape), log_p.new_zeros(*x.shape[:2], log_p.shape[-1])
    for read, path in zip(reversed(reads), reversed(paths(x, log_p, reads)), strict=True):
        readers = read.readers.flatten()
        rows, decay = decayed(take(x, readers), path)
        state = take(states, read.sources).flatten(0, 1)
        y = matmul(tall(rows, read.sources), state).view(*rows.shape[:-1], -1)
        dy = tall(pull(read, y, decay), read.sources)
        dstates.index_add_(1, read.sources, matmul(tall(rows, read.sources).mT, dy).unflatten(0, (x.shape[0], -1)))
        drows = matmul(dy, state.mT).view(rows.shape)
        dpath = of_gate(product(drows, rows).sum(-2), log_p.shape[-1])
        dx.index_add_(1, readers, drows if decay is not None else drows.mul_(path[:, :, None]))
        passed = take(beyond, readers).unflatten(1, read.readers.shape).sum(2)
        dlog_p.index_add_(1, read.sources, passed)
        beyond.index_add_(1, readers, dpath)
    return dx
