"""Both families as torch sees them: one registered node with a fake and an autograd formula.

torch.compile, torch.export and torch.jit.trace keep the node and do not look inside, where the numbers of a batch
(lengths, positions) decide what is done.
"""

# tokens: all sequences' tokens in one row; G groups, H heads, K key, V value, L levels, N sequences, M blocks, C chunk
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.torch import slab
from loglinear.kernels.torch.delta_rule import DeltaRuleSlab
from loglinear.kernels.torch.gradients import register_gradients
from loglinear.kernels.torch.recording import RUNS_BETWEEN_GRAPHS
from loglinear.kernels.torch.scalar_gate import ScalarGateSlab
from loglinear.kernels.torch.schedule import Schedule, schedule
from loglinear.kernels.torch.workspace import recycled
from loglinear.partition import Partition


@torch.library.custom_op("loglinear::fenwick_array", mutates_args=(), tags=RUNS_BETWEEN_GRAPHS)
def fenwick_array(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    level_scales: Tensor,
    initial: Tensor | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: int,
    chunk_size: int,
    final: bool,
    partition: list[int],
) -> tuple[Tensor, Tensor]:
    """Outputs [tokens,H,V]; with `final`, each sequence's block states at the start of its last chunk [N,M,H,K,V], else
    an empty tensor. The delta rule with beta, else the scalar gate.

    q, k [tokens,G,K]; v [tokens,H,V]; log_decay, beta [tokens,H]; level_scales [tokens,H,L], all of one dtype. They
    are those of `rows` sequences of one length, or of the documents of cu_seqlens [N+1]. Sequences that continue at
    `position` [N] have the states of their blocks in initial [N,M,H,K,V], and C tokens each in front of all new ones:
    those of the unfinished chunks. `partition` holds the numbers of a `Partition`.
    """
    tensors = (q, k, v, log_decay, beta, level_scales, initial)
    with torch.no_grad(), recycled():
        return stages(*tensors, position, cu_seqlens, rows, chunk_size, final, partition)


def stages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    level_scales: Tensor,
    initial: Tensor | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: int,
    chunk_size: int,
    final: bool,
    partition: list[int],
) -> tuple[Tensor, Tensor]:
    """Return the outputs of `fenwick_array`, open to autograd: with gradients on it records every stage."""
    plan = schedule_of(v, level_scales.shape[2], position, cu_seqlens, rows, chunk_size, final, partition)
    family, inputs = _family(q, k, v, log_decay, beta, level_scales, initial)
    return slab.forward(family, plan, inputs, final)


def _family(q, k, v, log_decay, beta, level_scales, initial):  # type: ignore[no-untyped-def]
    if beta is None:
        return ScalarGateSlab, (q, k, v, log_decay, level_scales, initial)
    return DeltaRuleSlab, (q, k, v, log_decay, beta, level_scales, initial)


def schedule_of(
    tokens: Tensor,
    num_columns: int,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: int,
    C: int,
    final: bool,
    partition: list[int],
) -> Schedule:
    """The schedule of a call's `tokens` [tokens,...], the buffered ones of continued sequences included."""
    if cu_seqlens is not None:
        lengths = tuple(cu_seqlens.diff().tolist())
    else:
        buffered = 0 if position is None else rows * C
        lengths = ((len(tokens) - buffered) // rows,) * rows
    positions = None if position is None else tuple(position.tolist())
    return schedule(lengths, positions, C, num_columns, final, tokens.device, Partition.of(partition))


@fenwick_array.register_fake
def _(q, k, v, log_decay, beta, level_scales, initial, position, cu_seqlens, rows, chunk_size, final, partition):  # type: ignore[no-untyped-def]
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    if not final:
        return output, v.new_empty(0)
    M = Partition.of(partition).num_blocks(level_scales.shape[2], int(chunk_size))
    N = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return output, v.new_empty(N, M, v.shape[1], q.shape[2], v.shape[2])


@torch.library.custom_op("loglinear::fenwick_array_backward", mutates_args=(), tags=RUNS_BETWEEN_GRAPHS)
def fenwick_array_backward(
    dout: Tensor | None,
    dblocks: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    level_scales: Tensor,
    initial: Tensor | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: int,
    chunk_size: int,
    final: bool,
    partition: list[int],
) -> list[Tensor]:
    """The gradients of the tensors that there are, in their order."""
    plan = schedule_of(v, level_scales.shape[2], position, cu_seqlens, rows, chunk_size, final, partition)
    family, inputs = _family(q, k, v, log_decay, beta, level_scales, initial)
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False), recycled():
        return [grad for grad in slab.backward(family, plan, inputs, dout, dblocks) if grad is not None]


register_gradients(fenwick_array, fenwick_array_backward, stages, differentiable=7)
