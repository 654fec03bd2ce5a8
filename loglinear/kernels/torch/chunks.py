"""Tokens moved into chunks and back, and the masks of a chunk: both families share them.

Inside a kernel every tensor is [H, n, C, ...]: a slab of heads, then chunks, then places in the chunk. Slabs keep the
temporaries small (they lie in memory that is used again, see `workspace`) and their number does not depend on the
sequence's length beyond what memory asks for.
"""

# H heads of a slab, n chunks (with the empty one), C chunk, L levels
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loglinear.fenwick import log2
from loglinear.kernels.torch.schedule import Schedule
from loglinear.kernels.torch.workspace import empty, is_recycling, take, zeros
from loglinear.partition import Partition

SLAB_BYTES = {"cpu": 9 << 19}  # of one [H, n, C, max(C, K, V)] temporary of all slabs that run at once
OTHER_DEVICES_SLAB_BYTES = 256 << 20
MOST_AT_ONCE = 4  # times as many bytes, where that gives every thread a slab of one head
SMALLEST_SHARE = 1 << 20  # bytes of a thread's part of it; below, the interpreter takes longer than the operations


def slab_heads(q: Tensor, v: Tensor, schedule: Schedule) -> tuple[list[slice], int]:
    """Ranges of heads that are worked on together, whole groups or heads of one group; how many of them run at once."""
    limit = SLAB_BYTES.get(v.device.type, OTHER_DEVICES_SLAB_BYTES)
    widest = max(q.shape[2], v.shape[2], schedule.chunk_size)
    per_head = (schedule.num_chunks + 1) * schedule.chunk_size * widest * v.element_size()
    heads, R = v.shape[1], v.shape[1] // q.shape[1]
    at_once = 1
    if is_recycling(v):  # elsewhere autograd may record, which is for one thread
        room, work = MOST_AT_ONCE * limit // per_head, heads * per_head // SMALLEST_SHARE
        at_once = max(1, min(torch.get_num_threads(), heads, room, work))
    fits = max(1, limit // at_once // per_head)
    step = -(-heads // max(at_once, -(-heads // fits)))  # even shares
    step = step // R * R if step >= R else max(d for d in range(1, step + 1) if R % d == 0)
    slabs = [slice(begin, min(begin + step, heads)) for begin in range(0, heads, step)]
    return slabs, min(at_once, len(slabs))


def group_slice(heads: slice, R: int) -> slice:
    """The query/key groups that a slab's heads read."""
    return slice(heads.start // R, (heads.stop - 1) // R + 1)


def to_chunks(x: Tensor, heads: slice, schedule: Schedule, R: int = 1) -> Tensor:
    """[tokens, heads, ...] -> [H, n, C, ...]; with R > 1, x has groups and every group serves R heads."""
    part = x[:, group_slice(heads, R)].transpose(0, 1)
    chunks = take(part, schedule.rows).index_fill_(1, schedule.padding, 0.0)
    if R > 1:
        groups, of_each = len(chunks), min(R, heads.stop - heads.start)
        copies = empty(chunks, groups, of_each, *chunks.shape[1:])
        chunks = copies.copy_(chunks[:, None].expand_as(copies)).flatten(0, 1)
    return chunks.view(len(chunks), -1, schedule.chunk_size, *x.shape[2:])


def from_chunks(chunks: Tensor, out: Tensor, heads: slice, schedule: Schedule, R: int = 1) -> None:
    """The adjoint of `to_chunks`: adds [H, n, C, ...] into out [tokens, heads or groups, ...]."""
    groups = group_slice(heads, R)
    if R > 1:
        chunks = chunks.unflatten(0, (groups.stop - groups.start, -1)).sum(1)
    tokens = take(chunks.flatten(1, 2), schedule.places)
    out[:, groups] += tokens.transpose(0, 1)


def block_view(matrix: Tensor, w: int, radix: int = 2, nearer: int = 0) -> Tensor:
    """The entries [i, j] of a [..., C, C] matrix whose blocks of w places lie in one block of radix * w, with `nearer`
    blocks between them, as a view [..., w, w, C / (radix w), radix - 1 - nearer].

    For radix 2 they are the lower left quarters of the diagonal blocks of 2w places.
    """
    C = matrix.shape[-1]
    blocks = matrix.unflatten(-1, (C // (radix * w), radix, w)).unflatten(-4, (C // (radix * w), radix, w))
    within = blocks.diagonal(dim1=-6, dim2=-3)  # [..., radix, w, radix, w, C / (radix w)]
    return within.diagonal(offset=-1 - nearer, dim1=-5, dim2=-3)


def row_view(rows: Tensor, w: int, radix: int, nearer: int) -> Tensor:
    """The entries [..., i] of the rows of `block_view`, as a view [..., w, C / (radix w), radix - 1 - nearer]."""
    C = rows.shape[-1]
    return rows.unflatten(-1, (C // (radix * w), radix, w))[..., 1 + nearer :, :].movedim(-1, -3)


def finest_view(matrix: Tensor, w: int) -> Tensor:
    """The diagonal blocks of w places of a [..., C, C] matrix, as a view [..., w, w, C / w]."""
    blocks = matrix.unflatten(-1, (-1, w)).unflatten(-3, (-1, w))
    return blocks.diagonal(dim1=-4, dim2=-2)


def decay_matrix(log_decay: Tensor) -> Tensor:
    """dec[i, j] = exp(g_{j+1} + ... + g_i) for i >= j, 0 above the diagonal. [..., C] -> [..., C, C].

    Block by block: for i in the right half of a block and j in the left, it is the decay from the middle to i times the
    decay from j to the middle. So every exponent is a sum of the very decays that it stands for, never a difference of
    two long sums (which loses digits once a decay is strong), and there are C log2(C) exponentials instead of C^2.
    """
    C = log_decay.shape[-1]
    matrix = zeros(log_decay, *log_decay.shape, C)
    matrix.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    for level in range(1, log2(C) + 1):
        w = 1 << (level - 1)
        left, right = log_decay.unflatten(-1, (C // (2 * w), 2, w)).unbind(-2)
        rows = right.cumsum(-1).exp().transpose(-1, -2)
        columns = suffix_sums(left).exp().transpose(-1, -2)
        block_view(matrix, w)[..., 0].copy_(rows.unsqueeze(-2) * columns.unsqueeze(-3))
    return matrix


def _blocks_inside(C: int, L: int, partition: Partition) -> Iterator[tuple[int, int, int]]:
    """(w, nearer, column) of `block_view` for every column inside a chunk."""
    for w, _, column in partition.heights(partition.finest_block, C // partition.finest_block - 1):
        for nearer in range(partition.radix - 1):
            yield w * partition.finest_block, nearer, min(column + nearer, L - 1)


def level_mask(level_scales: Tensor, partition: Partition) -> Tensor:
    """LAM[i, j] = lambda[i, min(index(i, j), L - 1)] for i >= j, 0 above the diagonal. [H,n,C,L] -> [H,n,C,C]."""
    (C, L), f, r = level_scales.shape[-2:], partition.finest_block, partition.radix
    mask = zeros(level_scales, *level_scales.shape[:-1], C)
    view = finest_view(mask, f)
    view.copy_(level_scales[..., 0].unflatten(-1, (-1, f)).movedim(-1, -2).unsqueeze(-2).expand_as(view))
    for w, nearer, column in _blocks_inside(C, L, partition):
        view = block_view(mask, w, r, nearer)
        view.copy_(row_view(level_scales[..., column], w, r, nearer).unsqueeze(-3).expand_as(view))
    return mask if f == 1 else mask.tril_()


def level_mask_backward(dmask: Tensor, dlevel_scales: Tensor, partition: Partition) -> None:
    """Adds the row sums of each column's entries into dlevel_scales [H, n, C, L]; dmask is lower triangular."""
    (C, L), f, r = dlevel_scales.shape[-2:], partition.finest_block, partition.radix
    own = dlevel_scales[..., 0].unflatten(-1, (-1, f)).movedim(-1, -2)
    own.add_(finest_view(dmask, f).sum(-2))
    for w, nearer, column in _blocks_inside(C, L, partition):
        rows = row_view(dlevel_scales[..., column], w, r, nearer)
        rows.add_(block_view(dmask, w, r, nearer).sum(-3))


def reverse_cumsum(x: Tensor, dim: int = -1) -> Tensor:
    """sum over i' >= i along a dimension."""
    return x.flip(dim).cumsum(dim).flip(dim)


def suffix_sums(x: Tensor, dim: int = -1) -> Tensor:
    """sum over i' > i along a dimension, counted from the last one."""
    return prefix_sums(x.flip(dim), dim).flip(dim)


def prefix_sums(x: Tensor, dim: int = -1) -> Tensor:
    """sum over i' < i along a dimension, counted from the last one."""
    return torch.constant_pad_nd(x, (0, 0) * (-1 - dim) + (1, -1)).cumsum(dim)


def tall(x: Tensor, sources: Tensor) -> Tensor:
    """[H, m * w, C, D] -> [H * m, w * C, D]: all rows that meet the same state, as one matrix."""
    return x.reshape(x.shape[0] * len(sources), -1, x.shape[-1])
