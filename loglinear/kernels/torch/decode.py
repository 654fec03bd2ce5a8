"""The parts of a decode step that do not depend on the family.

With i the token's place in its chunk, one step is row i of the chunk formulas plus a read of every block state; only
when the chunk is full are the block states rewritten: transported to its end, and merged.
"""

# N sequences, C chunk, M blocks, H heads, G groups, K key, V value, L levels
from __future__ import annotations

import torch
from torch import Tensor


def until(place: Tensor, gates: Tensor) -> Tensor:
    """The chunks' gates [N, C, H] as [N, H, C], 0 behind the new tokens, whose places are so the chunks' ends."""
    seen = torch.arange(gates.shape[1], device=place.device) <= place[:, None, None]
    return torch.where(seen, gates.transpose(1, 2), 0.0)


def row_scales(level_scales: Tensor, position: Tensor, chunk_size: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Each row's lambdas for the places of its chunk [N, H, C], 0 behind its token's, and for its blocks [N, H, M], 0
    for blocks that its past does not have."""
    N, H, L = level_scales.shape
    place, chunks = position % chunk_size, position // chunk_size
    places = torch.arange(chunk_size, device=place.device)
    levels = torch.frexp((place[:, None] ^ places).float()).exponent.clamp(max=L - 1).long()  # bit_length
    seen = places <= place[:, None, None]
    to_place = torch.where(seen, level_scales.gather(2, levels[:, None].expand(N, H, chunk_size)), 0.0)
    of_blocks = level_scales[..., -num_blocks:]  # `loglinear.fenwick.block_level` of each
    return to_place, torch.where(has_blocks(chunks, num_blocks)[:, None], of_blocks, 0.0)


def rows_to_merge(full: Tensor) -> Tensor | slice | None:
    """The rows that are full, None if none is; in a graph, which cannot ask, all rows: `merge_full` looks again."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return slice(None)
    rows = full.nonzero()[:, 0]
    return rows if len(rows) else None


def has_blocks(chunks: Tensor, num_blocks: int) -> Tensor:
    """[N, M]: `loglinear.fenwick.has_block` of each row's past."""
    number = torch.arange(num_blocks, device=chunks.device)
    left = chunks[:, None] >> number.clamp(max=62)
    return torch.where(number == num_blocks - 1, left > 0, left % 2 == 1)


def read_blocks(queries: Tensor, blocks: Tensor, weights: Tensor) -> Tensor:
    """sum over m of weights[m] * q^T S_m; queries [N,H,K], blocks [N,M,H,K,V], weights [N,H,M] -> [N,H,V]."""
    reads = (queries[:, None, :, None, :] @ blocks)[:, :, :, 0]
    return (weights.transpose(1, 2)[..., None] * reads).sum(1)


def merge_full(blocks: Tensor, transported: Tensor, chunk_state: Tensor, chunks: Tensor, full: Tensor) -> Tensor:
    """The block states after `chunks` finished chunks, in the rows that are `full`.

    The blocks smaller than 2**ctz(chunks) and the new chunk join into block ctz(chunks), the prefix at most.
    """
    M = blocks.shape[1]
    sizes = 1 << torch.arange(1, M, device=blocks.device).clamp(max=62)
    height = (chunks[:, None] % sizes == 0).sum(1, keepdim=True)  # ctz, at most M - 1
    number = torch.arange(M, device=blocks.device)
    is_older = (number > height) | (number == M - 1) & has_blocks(chunks - 1, M)
    shape = (*blocks.shape[:2], 1, 1, 1)
    joined = (transported * (number < height).view(shape)).sum(1) + chunk_state
    merged = torch.where(is_older.view(shape), transported, 0.0)
    merged = merged + joined[:, None] * (number == height).view(shape)
    return torch.where(full[:, None, None, None, None], merged, blocks)
