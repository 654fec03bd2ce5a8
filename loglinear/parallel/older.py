"""The read of older slices' states by the tokens of a slice.

o_t = local_t + sum_c lambda[t, c] * x_t^T S_c
"""

# B batch, T time, G groups, H heads, K key, V value, L levels, N sequences
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loglinear.parallel.incoming import Incoming
from loglinear.parallel.pieces import Run

TILE = 16_384  # tokens whose float32 reads exist at the same time


def with_older(
    local: Tensor, incoming: Incoming, level_scales: Tensor, states: list[Tensor], runs: tuple[Run, ...]
) -> Tensor:
    """Return local [B, T, H, V] plus the read of the states [N, H, K, V]; each run names the columns that read them.

    Tile by tile, in the states' dtype. Only the arguments are saved for backward, which computes the reads again.
    """
    tiles = list(_tiles(runs))
    lengths = [tile.length for tile in tiles]
    decays = [None] * len(tiles) if incoming.decay is None else incoming.decay.split(lengths, 1)
    parts = zip(local.split(lengths, 1), incoming.x.split(lengths, 1), level_scales.split(lengths, 1), strict=True)
    outputs = [
        checkpoint(_with_older, *part, decay, tile.columns, states, use_reentrant=False, preserve_rng_state=False)
        for tile, part, decay in zip(tiles, parts, decays, strict=True)
    ]
    return torch.cat(outputs, 1)


def _tiles(runs: tuple[Run, ...]) -> Iterator[Run]:
    """Yield the runs, the long ones in tiles."""
    for run in runs:
        for begin in range(0, run.length, TILE):
            yield run._replace(length=min(TILE, run.length - begin))


def _with_older(
    local: Tensor,
    x: Tensor,
    level_scales: Tensor,
    decay: Tensor | None,
    columns: tuple[int, ...],
    states: list[Tensor],
) -> Tensor:
    """Return one tile of `with_older`."""
    buckets: dict[int, Tensor] = {}
    for column, state in zip(columns, states, strict=True):
        buckets[column] = buckets[column] + state if column in buckets else state
    dtype, total = states[0].dtype, None
    for column, state in buckets.items():
        term = level_scales[..., column, None].to(dtype) * _product(x.to(dtype), state)
        total = term if total is None else total + term
    assert total is not None
    return (local + (total if decay is None else decay[..., None] * total)).to(local.dtype)


def _product(x: Tensor, state: Tensor) -> Tensor:
    """Return x_t^T S [B, T, H, V] for x [B, T, G, K] and the states [N, H, K, V] of all rows."""
    wide = state.unflatten(1, (x.shape[2], -1)).transpose(2, 3).flatten(3)  # [N, G, K, H / G * V]
    y = x.transpose(1, 2) @ wide
    return y.unflatten(3, (-1, state.shape[3])).permute(0, 2, 1, 3, 4).flatten(2, 3)
