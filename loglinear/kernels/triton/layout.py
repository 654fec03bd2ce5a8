"""The places of a batch's chunks: the sizes of a launch, and for packed or continued batches the tables on the device.

Nothing here waits for the device. How many chunks packed sequences fill is known there alone: the launches are as
large as it could need, and the rows of the tables that it does not need say so themselves.
"""

# N sequences, C chunk
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from loglinear.kernels.triton.tree import LEVELS, MAX_CHUNKS, Tree, candidates
from loglinear.kernels.unchanging import once
from loglinear.partition import FENWICK, Partition

Made = TypeVar("Made")


def once_a_batch(make: Callable[..., Made]) -> Callable[..., Made]:
    """`make`, a layout of packed sequences, `once` for all layers of a model and their backward, if its boundaries and
    starts are unchanging. It is a hundred small operations and more, which take the host a millisecond.
    """

    name = f"{make.__module__}.{make.__qualname__}"  # not the function: what is kept at a tensor is pickled with it

    @functools.wraps(make)
    def remembering(
        rows: int,
        tokens: int,
        chunk_size: int,
        num_levels: int,
        cu_seqlens: Tensor | None,
        starts: Tensor | None,
        *rest: object,
    ) -> Made:
        sizes = (rows, tokens, chunk_size, num_levels)
        return once(lambda: make(*sizes, cu_seqlens, starts, *rest), (name, *sizes, *rest), cu_seqlens, starts)

    return remembering


@dataclass(frozen=True)
class Layout:
    chunk_size: int
    tokens: int  # per row of the batch
    chunks_per_row: int
    chunks: int  # rows of every per-chunk array
    runs: tuple[int, ...]  # runs of entries, for each tier of the sweeps
    run_reads: int  # candidates whose blocks are runs or larger
    cap: int
    tree: Tree
    sequences: int
    table: Tensor | None  # [chunks, 5] int32: chunk number, first token, end of its sequence, first chunk, sequence
    run_tables: tuple[Tensor | None, ...]  # [runs, 5] int32: see `locate_run` in tiles.py
    ends: Tensor | None  # [N, 3] int32: row of chunk 0, complete chunks, first chunk
    first_runs: Tensor | None  # [N] int64: each sequence's first run in the first table of runs

    @property
    def reads(self) -> int:
        """An upper bound of the candidates of these chunks' walks."""
        return self.tree.run_read + self.run_reads


@once_a_batch
def layout(
    rows: int,
    tokens: int,
    chunk_size: int,
    num_levels: int,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
    partition: Partition = FENWICK,
) -> Layout:
    """The layout of a [rows, tokens] batch, or of one row that packs the sequences of cu_seqlens [N + 1].

    starts [N]: the chunk with which each packed sequence begins, for sequences that continue.
    """
    if cu_seqlens is None:
        return _dense_layout(rows, tokens, chunk_size, num_levels, partition)
    C, tree, per_row = chunk_size, Tree.of(partition, chunk_size), chunks_per_row(tokens, chunk_size)
    cap, tier, run = partition.num_blocks(num_levels, C) - 1, tree.tier, 1 << tree.tier
    tiers = -(-(LEVELS if starts is not None else max(1, per_row.bit_length() - 1)) // tier)
    reads = _run_reads(tree, MAX_CHUNKS if starts is not None else per_row)
    N = len(cu_seqlens) - 1
    lengths = cu_seqlens.diff()
    z0 = torch.zeros_like(lengths) if starts is None else starts
    own = (lengths + C - 1) // C
    chunks = tokens // C + N
    sequence, number, is_real = ragged(own, chunks)
    z = number + z0[sequence]
    first = cu_seqlens[sequence] + number * C
    end = torch.where(is_real, cu_seqlens[sequence + 1], 0)
    table = torch.stack([z, first, end, z0[sequence], sequence], 1).int()
    origin, count = own.cumsum(0) - own - z0, own + z0
    run_tables = []
    for s in range(tiers):
        skipped = z0 >> (tier * (s + 1))
        runs_of = (((count >> (tier * s)) + run - 1) // run - skipped).clamp(min=0)
        runs_of = torch.where(own > 0, runs_of, 0)  # without chunks of its own a sequence only hands its blocks on
        if s == 0:
            first_runs = runs_of.cumsum(0) - runs_of
        # One run more than full ones for each sequence with entries here; two where its first need not be full either.
        more = min(N, chunks >> (tier * s)) if starts is None else 2 * N
        sequence, number, is_real = ragged(runs_of, (chunks >> (tier * (s + 1))) + more)
        columns = [origin[sequence], torch.where(is_real, count[sequence], 0), number + skipped[sequence]]
        run_tables.append(torch.stack([*columns, z0[sequence], sequence], 1).int())
    ends = torch.stack([origin, z0 + lengths // C, z0], 1).int()
    return Layout(
        C,
        tokens,
        per_row,
        chunks,
        tuple(map(len, run_tables)),
        reads,
        cap,
        tree,
        N,
        table,
        tuple(run_tables),
        ends,
        first_runs,
    )


def chunks_per_row(tokens: int, chunk_size: int) -> int:
    """Return the chunks of a row; ValueError if a walk cannot read as many."""
    if tokens // chunk_size >= MAX_CHUNKS:
        most = MAX_CHUNKS * chunk_size
        raise ValueError(f"impl='triton' takes sequences below {most} tokens at chunk size {chunk_size}, got {tokens}")
    return -(-tokens // chunk_size)


@functools.lru_cache
def _dense_layout(rows: int, tokens: int, chunk_size: int, num_levels: int, partition: Partition) -> Layout:
    """The layout of a batch that is not packed has no tables."""
    C, tree, per_row = chunk_size, Tree.of(partition, chunk_size), chunks_per_row(tokens, chunk_size)
    cap, tier = partition.num_blocks(num_levels, C) - 1, tree.tier
    tiers = -(-max(1, per_row.bit_length() - 1) // tier)
    entries = [per_row >> (tier * s) for s in range(tiers)]
    runs = tuple(rows * max(1, -(-n // (1 << tier))) for n in entries)
    reads, no_tables = _run_reads(tree, per_row), (None,) * tiers
    return Layout(C, tokens, per_row, rows * per_row, runs, reads, cap, tree, rows, None, no_tables, None, None)


def _run_reads(tree: Tree, chunks: int) -> int:
    """Return how many candidates of the walks of so many chunks are blocks of a run or larger ones."""
    return max(0, candidates(tree.radix_log, chunks - 1) - tree.run_read)


def ragged(counts: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers `limit` items: which sequence each belongs to, its number there, and whether there is such an item."""
    ends = counts.cumsum(0)
    item = torch.arange(limit, device=counts.device)
    sequence = torch.searchsorted(ends, item, right=True).clamp(max=len(counts) - 1)
    return sequence, item - (ends - counts)[sequence], item < ends[-1]
