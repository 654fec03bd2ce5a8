"""The energies of buckets, by the Fenwick array with sums in place of states.

The energy is q_t^T M_b q_t, where M_b is the sum of k_s k_s^T. A chunk is a finest block, so every column but the first
is a block or a prefix. Column 0 has energy 0. Only the inputs are saved for backward, which computes the sums again.
"""

# tokens: the tokens of all sequences in one row; G groups, K key, L columns, N sequences, M blocks, C chunk
# Inside a slab of groups: [G, n, C, K], n chunks (with the empty one)
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.torch.chunks import from_chunks, slab_heads, tall, to_chunks
from loglinear.kernels.torch.gradients import register_gradients
from loglinear.kernels.torch.operator import schedule_of
from loglinear.kernels.torch.recording import RUNS_BETWEEN_GRAPHS
from loglinear.kernels.torch.schedule import Merge, Schedule
from loglinear.kernels.torch.step import merge_full, rows_to_merge
from loglinear.kernels.torch.threads import run
from loglinear.kernels.torch.workspace import empty, matmul, product, recycled, take, zeros
from loglinear.partition import Partition


@torch.library.custom_op("loglinear::bucket_energies", mutates_args=(), tags=RUNS_BETWEEN_GRAPHS)
def bucket_energies(
    q: Tensor,
    k: Tensor,
    initial: Tensor | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: int,
    num_columns: int,
    final: bool,
    partition: list[int],
) -> tuple[Tensor, Tensor]:
    """Return the energies [tokens,G,L] and the sums of blocks.

    With `final` the sums are those of each sequence at the start of its last chunk [N,M,G,K,K], otherwise an empty
    tensor. The arguments are those of `fenwick_array`: q, k [tokens,G,K] and initial [N,M,G,K,K], the sums of earlier
    blocks, which are symmetric. L is at least 2.
    """
    with torch.no_grad(), recycled():
        return energies(q, k, initial, position, cu_seqlens, rows, num_columns, final, partition)


def energies(
    q: Tensor,
    k: Tensor,
    initial: Tensor | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: int,
    num_columns: int,
    final: bool,
    partition: list[int],
) -> tuple[Tensor, Tensor]:
    """Return the outputs of `bucket_energies`. With gradients on, autograd records every stage."""
    C, K = Partition.of(partition).finest_block, q.shape[2]
    plan = schedule_of(q, num_columns, position, cu_seqlens, rows, C, final, partition)
    out = q.new_zeros(*q.shape[:2], num_columns)
    blocks = q.new_zeros(plan.num_sequences, plan.num_blocks, q.shape[1], K, K) if final else q.new_zeros(0)

    def compute(groups: slice) -> Tensor:
        queries, sums = to_chunks(q, groups, plan), block_sums(to_chunks(k, groups, plan), initial, groups, plan)
        found = zeros(queries, *queries.shape[:3], num_columns)
        for read in plan.reads:
            x = take(queries, read.readers)
            y = matmul(tall(x, read.sources), take(sums, read.sources).flatten(0, 1)).view_as(x)
            found[..., read.column].index_add_(1, read.readers.flatten(), product(y, x).sum(-1))
        for read in plan.final_reads:  # a sum of blocks that is no prefix is read by one sequence alone
            blocks[read.readers.flatten(), read.column, groups] = take(sums, read.sources).transpose(0, 1)
        return found

    run(compute, lambda groups, found: from_chunks(found, out, groups, plan), *slab_heads(q, q, plan))
    return out, blocks


def block_sums(keys: Tensor, initial: Tensor | None, groups: slice, plan: Schedule) -> Tensor:
    """Return the sums of all slots [G, rows, K, K] from the keys [G, n, C, K]."""
    G, n, _, K = keys.shape
    sums = empty(keys, G, plan.num_rows, K, K)
    matmul(keys.mT, keys, out=sums[:, :n])
    if initial is not None:
        sums[:, plan.initial] = initial[:, :, groups].flatten(0, 1).transpose(0, 1)
    for merge in plan.merges:
        _add(sums, merge)
    if plan.scan is not None:
        prefixes = take(sums, plan.scan.entries)
        for merge in (*plan.scan.ups, *plan.scan.downs):
            _add(prefixes, merge)
        sums.index_copy_(1, plan.scan.prefixes, prefixes)
    return sums


def block_sums_backward(dsums: Tensor, plan: Schedule) -> None:
    """Turn the gradients of all slots into those of the chunks' own sums and of the initial blocks, in place."""
    if plan.scan is not None:
        total = take(dsums, plan.scan.prefixes)
        for merge in (*plan.scan.mirrored_ups, *plan.scan.mirrored_downs):
            _add(total, merge)
        dsums.index_fill_(1, plan.scan.prefixes, 0.0)  # they may be the entries themselves
        dsums.index_add_(1, plan.scan.entries, total)
    for merge in reversed(plan.merges):
        dsums.index_add_(1, merge.left, take(dsums, merge.right))


def add_keys(
    keys: Tensor, values: Tensor, new: Tensor, blocks: Tensor, position: Tensor, full: Tensor, partition: Partition
) -> None:
    """Write the keys of one token, new [N,G,K], into the buffers [N,C,G,K] of each row's chunk, in place.

    Full chunks are added to the sums of their rows, blocks [N,M,G,K,K], in place.
    """
    C = keys.shape[1]
    row, place = torch.arange(len(position), device=position.device), position % C
    keys[row, place] = new
    values[row, place] = new
    rows = rows_to_merge(full)
    if rows is not None:
        chunk, before = keys[rows].transpose(1, 2), blocks[rows]
        chunks = position[rows] // C + 1
        blocks[rows] = merge_full(before, before, chunk.mT @ chunk, chunks, full[rows], C, partition)


def _add(sums: Tensor, merge: Merge) -> None:
    sums.index_add_(1, merge.right, take(sums, merge.left))


@bucket_energies.register_fake
def _(q, k, initial, position, cu_seqlens, rows, num_columns, final, partition):  # type: ignore[no-untyped-def]
    found = q.new_empty(q.shape[0], q.shape[1], num_columns)
    if not final:
        return found, q.new_empty(0)
    M = Partition.of(partition).num_blocks(num_columns, Partition.of(partition).finest_block)
    N = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return found, q.new_empty(N, M, q.shape[1], q.shape[2], q.shape[2])


@torch.library.custom_op("loglinear::bucket_energies_backward", mutates_args=(), tags=RUNS_BETWEEN_GRAPHS)
def bucket_energies_backward(
    dfound: Tensor | None,
    dblocks: Tensor | None,
    q: Tensor,
    k: Tensor,
    initial: Tensor | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: int,
    num_columns: int,
    final: bool,
    partition: list[int],
) -> list[Tensor]:
    """Return the gradients of q, k and, if there are any, of the initial blocks."""
    C = Partition.of(partition).finest_block
    plan = schedule_of(q, num_columns, position, cu_seqlens, rows, C, final, partition)
    dq, dk = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    dinitial = None if initial is None else torch.empty_like(initial, memory_format=torch.contiguous_format)

    def compute(groups: slice) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys = to_chunks(q, groups, plan), to_chunks(k, groups, plan)
        sums = block_sums(keys, initial, groups, plan)
        dqueries, dsums = zeros(queries, *queries.shape), zeros(sums, *sums.shape)
        if dfound is not None:
            weights = to_chunks(dfound, groups, plan)
            for read in plan.reads:
                x = take(queries, read.readers)
                weighted = product(x, take(weights[..., read.column], read.readers)[..., None])
                rows = tall(weighted, read.sources)
                dsum = matmul(tall(x, read.sources).mT, rows)
                dsums.index_add_(1, read.sources, dsum.unflatten(0, (len(sums), -1)))
                y = matmul(rows, take(sums, read.sources).flatten(0, 1)).view_as(x)
                dqueries.index_add_(1, read.readers.flatten(), y, alpha=2)
        if dblocks is not None:
            for read in plan.final_reads:
                dsums.index_add_(1, read.sources, dblocks[read.readers.flatten(), read.column, groups].transpose(0, 1))
        block_sums_backward(dsums, plan)
        own = dsums[:, : keys.shape[1]]
        return dqueries, matmul(keys, own + own.mT), dsums[:, plan.initial]

    def add(groups: slice, computed: tuple[Tensor, Tensor, Tensor]) -> None:
        from_chunks(computed[0], dq, groups, plan)
        from_chunks(computed[1], dk, groups, plan)
        if dinitial is not None:
            dinitial[:, :, groups] = computed[2].transpose(0, 1).unflatten(0, dinitial.shape[:2])

    with torch.no_grad(), torch.autocast(q.device.type, enabled=False), recycled():
        run(compute, add, *slab_heads(q, q, plan))
    return [dq, dk] if dinitial is None else [dq, dk, dinitial]


register_gradients(bucket_energies, bucket_energies_backward, energies, differentiable=3)
