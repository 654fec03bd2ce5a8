"""The scores of buckets on sequences that lie on several devices.

A score is linear in the sums M_b of its bucket's keys, and no transition changes a sum. So each rank sends one sum for
each bucket that holds its tokens at the end of its slice. A later rank starts `bucket_scores` from the totals of these
sums. The forward pass has one all-gather, and the backward pass one reduce-scatter.
"""

# B batch, T time, G query/key groups, K key, L columns, N sequences, M blocks
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loglinear import ops
from loglinear.ops import BucketScores, FenwickState
from loglinear.ops.problem import unit_length
from loglinear.ops.scores import zero_sums
from loglinear.ops.validation import working_dtype
from loglinear.parallel.collectives import all_gather, between_graphs, joined
from loglinear.parallel.layouts import check_batch, most_pieces, older_pieces, on_device
from loglinear.parallel.pieces import Tree, pieces
from loglinear.partition import Partition

if TYPE_CHECKING:
    from loglinear.parallel.slices import Slices


@between_graphs
def bucket_scores(
    q: Tensor,
    k: Tensor,
    *,
    slices: Slices,
    num_columns: int,
    partition: Partition,
    impl: str = "auto",
) -> BucketScores:
    """Return `loglinear.bucket_scores` of whole sequences, for the tokens of this rank's slice.

    Every rank of the mesh dimension must call it. If one rank runs the backward pass, every rank must. A slice costs
    one more product of its keys with themselves.

    Args:
        q: [B, n, G, K], the queries of this rank's tokens, as `slices.take` gives them.
        k: [B, n, G, K], the keys.
        slices: The slices of the sequences, made with a multiple of the partition's finest block.
        num_columns: L.
        partition: The partition of the past.
        impl: The implementation, as in `loglinear.bucket_scores`.

    Returns:
        `BucketScores(scores, tokens, None)`.

    Raises:
        ValueError: An argument does not fit, as in `loglinear.bucket_scores`, or the slices do not fit it.
    """
    check_batch(slices, q, partition.finest_block)
    tree = Tree(partition, partition.finest_block, num_columns)
    with torch.autocast(q.device.type, enabled=False):
        gathered = all_gather(_own_sums(slices, tree, k), slices.processes)
        found = []
        for part in slices.parts:
            state = _carried(slices, tree, gathered, k) if part.position else None
            found.append(
                ops.bucket_scores(
                    q[:, part.begin : part.end],
                    k[:, part.begin : part.end],
                    num_columns=num_columns,
                    partition=partition,
                    initial_state=state,
                    cu_seqlens=None if part.documents is None else on_device(part.documents, q.device),
                    impl=impl,
                )
            )
        scores = joined(torch.cat([part.scores for part in found], 1), gathered)
        return BucketScores(scores, torch.cat([part.tokens for part in found], 1), None)


def _own_sums(slices: Slices, tree: Tree, k: Tensor) -> Tensor:
    """Return the sums [N, m, G, K, K] of the pieces of the document that goes on; zeros for missing ones."""
    rows, _, groups, key_dim = k.shape
    most = max(most_pieces(slices, tree), 1)
    own, dtype = slices.spans[slices.rank], working_dtype([k])
    sums = []
    if own is not None:
        last = own[1]
        for piece in pieces(*own, tree):
            keys = unit_length(k[:, piece.first - last : piece.token + 1 - last or None].to(dtype))
            sums.append(torch.einsum("btgk,btgl->bgkl", keys, keys))
    missing = torch.zeros((), dtype=dtype, device=k.device).expand(rows, groups, key_dim, key_dim)
    return joined(torch.stack([*sums, *[missing] * (most - len(sums))], 1), k)


def _carried(slices: Slices, tree: Tree, gathered: Tensor, k: Tensor) -> FenwickState:
    """Return the state at the beginning of this slice, with the sums of the older slices."""
    rows, _, groups, key_dim = k.shape
    position = on_device((slices.position,) * rows, k.device)
    empty = zero_sums(
        rows,
        num_columns=tree.num_columns,
        groups=groups,
        key_dim=key_dim,
        partition=tree.partition,
        position=position,
        dtype=gathered.dtype,
        device=k.device,
    )
    blocks = list(empty.blocks.unbind(1))
    for rank, older in older_pieces(slices, tree):
        for n, (column, _) in enumerate(older):
            number = max(column - 1, 0)  # column 0 is the finest block itself
            blocks[number] = blocks[number] + gathered[rank][:, n]
    # A graph of torch 2.11 loses the last fields of a state that `_replace` made.
    return FenwickState(position, torch.stack(blocks, 1), *empty[2:-1], first=on_device((0,) * rows, k.device))
