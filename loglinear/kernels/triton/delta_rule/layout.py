"""The tree over a sequence's chunks: where its entries lie, on the host and for packed batches in small tables on the
device.

The entries of tier 0 are the chunks. r entries are a run, with radix 2 eight, and a run is an entry of the next tier. A
sequence has the entries that hold its chunks from the first one (chunk z0 where it continues a state) to the unfinished
one. An entry reads states of its run, r - 1 at most, with radix 2 one for each of three levels (`slots`). It reads the
past before the run through states that are carried to the run's start (`columns`, one for each column of lambda).
"""

# N sequences, C chunk
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from loglinear.kernels.triton.layout import chunks_per_row, once_a_batch, ragged
from loglinear.kernels.triton.tree import LEVELS, Tree, candidates
from loglinear.partition import FENWICK, Partition

TIER_LEVELS = 3  # of a tier with radix 2; with a larger radix a tier is one digit


@dataclass(frozen=True)
class Tier:
    entries: int  # rows of every array of entries
    runs: int
    per_row: int  # entries of one sequence of a dense batch
    first_block: int  # the number of the block in the first slot, as a state numbers its blocks
    slots: int
    columns: int
    collapsed: bool  # is what lies before the run in one block with the last slot?
    table: Tensor | None  # [runs, 6] int32: row of entry 0, first and behind the last entry, run's number,
    # sequence, is there a later run?


@dataclass(frozen=True)
class Layout:
    cap: int
    tree: Tree
    sequences: int
    tiers: tuple[Tier, ...]
    table: Tensor | None  # [chunks, 5] int32: chunk number, first token, end of its sequence, first chunk, sequence
    ends: Tensor | None  # [N, 3] int32: row of the unfinished chunk, its number, the first chunk's
    first_runs: Tensor | None  # [N] int64: each sequence's first run of chunks

    @property
    def chunks(self) -> int:
        return self.tiers[0].entries

    @property
    def chunks_per_row(self) -> int:
        return self.tiers[0].per_row


def tree_of(partition: Partition, chunk_size: int) -> Tree:
    return Tree.of(partition, chunk_size, TIER_LEVELS)


def count_chunks(rows: int, tokens: int, chunk_size: int, sequences: int | None, final: bool) -> int:
    """Rows of every array of chunks: of a [rows, tokens] batch, or of one row that packs so many sequences."""
    if sequences is not None:
        return tokens // chunk_size + sequences
    return rows * (tokens // chunk_size + 1 if final else -(-tokens // chunk_size))


@once_a_batch
def layout(
    rows: int,
    tokens: int,
    chunk_size: int,
    num_levels: int,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
    final: bool,
    partition: Partition = FENWICK,
) -> Layout:
    """The layout of a [rows, tokens] batch, or of one row that packs the sequences of cu_seqlens [N + 1].

    starts [N]: the chunk with which each packed sequence begins, for sequences that continue. final: the unfinished
    chunk has a place even where it has no tokens; packed sequences always have it."""
    chunks_per_row(tokens, chunk_size)
    if cu_seqlens is None:
        return _dense_layout(rows, tokens, chunk_size, num_levels, final, partition)
    C, cap = chunk_size, partition.num_blocks(num_levels, chunk_size) - 1
    tree = tree_of(partition, C)
    tier, run = tree.tier, 1 << tree.tier
    N, lengths = len(cu_seqlens) - 1, cu_seqlens.diff()
    z0 = torch.zeros_like(lengths) if starts is None else starts
    z_end = z0 + lengths // C
    own = z_end - z0 + 1
    chunks = count_chunks(1, tokens, C, N, final)
    sequence, number, is_real = ragged(own, chunks)
    end = torch.where(is_real, cu_seqlens[sequence + 1], 0)
    z = torch.where(is_real, number, 0) + z0[sequence]
    table = torch.stack([z, cu_seqlens[sequence] + number * C, end, z0[sequence], sequence], 1).int()
    row = own.cumsum(0) - own
    ends = torch.stack([row + own - 1, z_end, z0], 1).int()

    tiers = max(1, -(-(LEVELS if starts is not None else (tokens // C).bit_length()) // tier))
    reads = tiers * tree.run_read if starts is not None else candidates(tree.radix_log, tokens // C)
    sizes, tables, first_runs = [], [], None
    entries, first, last = chunks, z0, z_end
    for s in range(tiers):
        runs_of = (last >> tier) - (first >> tier) + 1
        runs = (tokens // C >> (tier * (s + 1))) + (N if starts is None else 2 * N)
        sequence, number, is_real = ragged(runs_of, runs)
        is_last = number + 1 >= runs_of[sequence]
        number = number + (first >> tier)[sequence]
        begin = number * run
        start, stop = (first[sequence] - begin).clamp(min=0), (last[sequence] + 1 - begin).clamp(max=run)
        columns = [(row - first)[sequence] + begin, start, torch.where(is_real, stop, 0), number, sequence, ~is_last]
        tables.append(torch.stack(columns, 1).int())
        sizes.append((entries, runs, 0))
        row, entries, first, last = runs_of.cumsum(0) - runs_of, runs, first >> tier, last >> tier
        first_runs = row if s == 0 else first_runs
    found = _tiers(cap, tree, reads, sizes, tables, 0 if starts is None else 1)
    return Layout(cap, tree, N, found, table, ends, first_runs)


@lru_cache
def _dense_layout(
    rows: int, tokens: int, chunk_size: int, num_levels: int, final: bool, partition: Partition
) -> Layout:
    """The layout of a batch that is not packed has no tables."""
    cap, tree = partition.num_blocks(num_levels, chunk_size) - 1, tree_of(partition, chunk_size)
    per_row = count_chunks(1, tokens, chunk_size, None, final)
    levels, reads, sizes = (per_row - 1).bit_length(), candidates(tree.radix_log, per_row - 1), []
    for _ in range(max(1, -(-levels // tree.tier))):
        runs = -(-per_row >> tree.tier)
        sizes.append((rows * per_row, rows * runs, per_row))
        per_row = runs
    return Layout(cap, tree, rows, _tiers(cap, tree, reads, sizes, [None] * len(sizes), 0), None, None, None)


def _tiers(
    cap: int,
    tree: Tree,
    reads: int,
    sizes: list[tuple[int, int, int]],
    tables: Sequence[Tensor | None],
    columns: int,
) -> tuple[Tier, ...]:
    """From the last, to whose runs so many columns are carried, to the first. reads: the candidates of all walks."""
    tiers: list[Tier] = []
    for s in reversed(range(len(sizes))):
        first_block = tree.run_read * s
        own, here = max(0, cap - first_block), min(tree.run_read, max(1, reads - first_block))
        slots, collapsed = min(own + 1, here), own < tree.run_read
        tiers.append(Tier(*sizes[s], first_block, slots, columns, collapsed, tables[s]))
        columns = slots + columns - (min(columns, 1) if collapsed else 0)
    return tuple(reversed(tiers))
