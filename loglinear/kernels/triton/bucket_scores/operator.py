"""The scores as torch sees them: one registered node with a fake and an autograd formula. It never waits."""

# B batch, T time, G groups, K key, L columns, N sequences, M blocks
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loglinear.kernels.torch import block_tokens
from loglinear.kernels.torch.bucket_energies import energies
from loglinear.kernels.torch.gradients import register_gradients
from loglinear.kernels.triton.bucket_scores.backward import gradients
from loglinear.kernels.triton.bucket_scores.forward import forward
from loglinear.kernels.triton.inputs import Sequences
from loglinear.partition import Partition


@torch.library.custom_op("loglinear::bucket_scores", mutates_args=())
def bucket_scores(
    q: Tensor,
    k: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
    first: Tensor | None,
    num_columns: int,
    chunk_size: int,
    final: bool,
    partition: list[int],
) -> tuple[Tensor, Tensor]:
    """Return the scores [B,T,G,L] in float32, and with `final` each sequence's sums of blocks, else an empty tensor.

    The sums are [N,M,G,K,K] in float32, at the start of the sequence's unfinished chunk. q, k [B,T,G,K], of any length.
    initial [N,M,G,K,K], starts [N], first [N]: the sums of each packed sequence's initial blocks, its first chunk's
    number, and the position of its first token, before which all keys are 0. With them q and k have length 1.
    `partition` holds the numbers of a `Partition`, of which chunk_size is a block. Both sums are symmetric and lack
    their mean for random keys, n / K I.
    """
    sequences = Sequences(cu_seqlens, starts, final, Partition.of(partition))
    scores, blocks = forward(q, k, initial, sequences, first, num_columns, chunk_size)
    return scores, q.new_empty(0, dtype=torch.float32) if blocks is None else blocks


@bucket_scores.register_fake
def _(q, k, initial, cu_seqlens, starts, first, num_columns, chunk_size, final, partition):  # type: ignore[no-untyped-def]
    scores = q.new_empty(*q.shape[:3], num_columns, dtype=torch.float32)
    if not final:
        return scores, q.new_empty(0, dtype=torch.float32)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    M = Partition.of(partition).num_blocks(num_columns, int(chunk_size))
    return scores, q.new_empty((N, M, q.shape[2], q.shape[3], q.shape[3]), dtype=torch.float32)


@torch.library.custom_op("loglinear::bucket_scores_backward", mutates_args=())
def bucket_scores_backward(
    dscores: Tensor | None,
    dblocks: Tensor | None,
    q: Tensor,
    k: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
    first: Tensor | None,
    num_columns: int,
    chunk_size: int,
    final: bool,
    partition: list[int],
) -> list[Tensor]:
    """Return the gradients of q, k and, if there are any, of the initial blocks."""
    if dscores is None or num_columns == 1:  # column 0 is 0 for every input
        dscores = q.new_zeros(*q.shape[:3], num_columns, dtype=torch.float32)
    sequences = Sequences(cu_seqlens, starts, final, Partition.of(partition))
    return gradients(dscores, dblocks, q, k, initial, sequences, first, chunk_size)


def stages(
    q: Tensor,
    k: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
    first: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the outputs of `bucket_scores` by kernels.torch in float32, except for constants. Autograd records it."""
    num_columns, chunk_size, final, partition = options
    rows, K = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, q.shape[3]
    buffered = 0 if starts is None else rows * chunk_size
    count = q.shape[0] * q.shape[1] if cu_seqlens is None else int(cu_seqlens[-1])  # packed rows may end in padding

    def tokens(x: Tensor) -> Tensor:
        new = x.flatten(0, 1)[:count].float()
        if starts is None:
            new = new * torch.rsqrt(new.square().sum(-1, keepdim=True) + 1e-6)
        return torch.cat([new.new_zeros(buffered, *new.shape[1:]), new])

    position = None
    if initial is not None and starts is not None:
        position = starts * chunk_size
        means = block_tokens(starts, initial.shape[1], chunk_size, Partition.of(partition), first) / K
        initial = initial + means[..., None, None, None] * torch.eye(K, device=q.device)
    found, blocks = energies(tokens(q), tokens(k), initial, position, cu_seqlens, rows, num_columns, final, partition)
    found = torch.cat([torch.zeros_like(found[..., :1]), found[..., 1:]], -1)[buffered:]
    padding = found.new_zeros(q.shape[0] * q.shape[1] - count, *found.shape[1:])
    return torch.cat([found, padding]).view(*q.shape[:3], num_columns), blocks


register_gradients(bucket_scores, bucket_scores_backward, stages, differentiable=3)
