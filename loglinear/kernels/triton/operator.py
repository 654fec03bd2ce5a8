"""The operators as torch sees them: one node, registered with fakes and an autograd formula, so that torch.compile,
checkpointing and CUDA graphs work. Nothing in it waits for the device."""

# B batch, T time, G groups, H heads, K key, V value, L levels, N sequences, M blocks
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loglinear.kernels import MIN_LOG_DECAY
from loglinear.kernels.torch.gradients import recorded_gradients
from loglinear.kernels.torch.operator import stages
from loglinear.kernels.triton import delta_rule, diagonal_gate, scalar_gate
from loglinear.kernels.triton.inputs import Operands, Outgoing, Results, Sequences
from loglinear.kernels.triton.launches import Plan
from loglinear.kernels.triton.replay import Tensors, replayed
from loglinear.partition import Partition


def _family(log_decay: Tensor, beta: Tensor | None) -> Any:
    """The kernels of one family: all have the same functions."""
    if beta is not None:
        return delta_rule
    return scalar_gate if log_decay.dim() == 3 else diagonal_gate


def _forward(x: Operands, sequences: Sequences, scale: float, plan: Plan) -> Results:
    family = _family(x.log_decay, x.beta)
    parts = [
        family.forward(family.inputs_of(x.heads(h), sequences, scale, plan), final=sequences.final)
        for h in family.forward_slabs(x, sequences, plan)
    ]
    return Results.joined(parts)


def _gradients(x: Operands, sequences: Sequences, outgoing: Outgoing, scale: float, plan: Plan) -> Operands:
    return _family(x.log_decay, x.beta).gradients(x, sequences, outgoing, scale, plan)


@replayed
def _dense_forward(tensors: Tensors, scale: float, plan: Plan, final: bool, partition: Partition) -> Results:
    return _forward(Operands(*tensors), Sequences(None, None, final, partition), scale, plan)


@replayed
def _dense_gradients(tensors: Tensors, scale: float, plan: Plan, final: bool, partition: Partition) -> Operands:
    sequences = Sequences(None, None, final, partition)
    return _gradients(Operands(*tensors[:7]), sequences, Outgoing(*tensors[7:]), scale, plan)


@torch.library.custom_op("loglinear::chunkwise", mutates_args=())
def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    level_scales: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
    scale: float,
    chunk_size: int,
    final: bool,
    partition: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs [B,T,H,V]; with `final`, each sequence's block states at the start of its unfinished chunk [N,M,H,K,V]
    float32; of the delta rule the arrays saved for the backward, each chunk's inverse [chunk,H,C,C] and its
    cumulative log decay [chunk,H,C] (0 of a diagonal gate, whose rows have decayed before); else empty tensors. The
    delta rule with beta; a diagonal gate with log_decay [B,T,H,K], else a scalar one.

    initial [N,M,H,K,V], starts [N]: the blocks of each packed sequence's initial state, and its first chunk's number.
    chunk_size 0 leaves the choice to the kernels, for radix 2 without a finest block; with `final` or initial it is the
    states' chunk size. `partition` holds the numbers of a `Partition`.
    """
    family, operands = _family(log_decay, beta), Operands(q, k, v, log_decay, beta, level_scales, initial)
    plan = family.plan_of("forward", operands, chunk_size or None)
    sequences = Sequences(cu_seqlens, starts, final, Partition.of(partition))
    if cu_seqlens is None:
        output, *others = _dense_forward(operands, scale, plan, final, sequences.partition)
    else:
        output, *others = _forward(operands, sequences, scale, plan)
    blocks, inverse, cumulative = (v.new_empty(0, dtype=torch.float32) if x is None else x for x in others)
    return output, blocks, inverse, cumulative


@chunkwise.register_fake
def _(q, k, v, log_decay, beta, level_scales, initial, cu_seqlens, starts, scale, chunk_size, final, partition):  # type: ignore[no-untyped-def]
    H, rows = v.shape[2], q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    blocks, inverse, cumulative = (v.new_empty(0, dtype=torch.float32) for _ in range(3))
    if final:
        M = Partition.of(partition).num_blocks(level_scales.shape[3], int(chunk_size))
        blocks = v.new_empty((rows, M, H, q.shape[3], v.shape[3]), dtype=torch.float32)
    if beta is not None:
        C = delta_rule.choose_chunk_size(q, k, v, log_decay.dim() == 4, chunk_size)
        chunks = delta_rule.count_chunks(q.shape[0], q.shape[1], C, None if cu_seqlens is None else rows, final)
        inverse = v.new_empty((chunks, H, C, C), dtype=delta_rule.state_dtype(q, k, v, C))
        cumulative = v.new_empty((chunks, H, C), dtype=torch.float32)
    return output, blocks, inverse, cumulative


@torch.library.custom_op("loglinear::chunkwise_backward", mutates_args=())
def chunkwise_backward(
    do: Tensor,
    dblocks: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    level_scales: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
    inverse: Tensor,
    cumulative: Tensor,
    scale: float,
    chunk_size: int,
    final: bool,
    partition: list[int],
) -> list[Tensor]:
    """dq, dk, dv, dlog_decay, dbeta where there is beta, dlevel_scales, and dinitial where there is initial."""
    family, operands = _family(log_decay, beta), Operands(q, k, v, log_decay, beta, level_scales, initial)
    saved = (None, None) if beta is None else (inverse, cumulative)
    plan = family.plan_of("backward", operands, chunk_size or None)
    sequences, outgoing = Sequences(cu_seqlens, starts, final, Partition.of(partition)), Outgoing(do, dblocks, *saved)
    if cu_seqlens is None:
        grads = _dense_gradients((*operands, *outgoing), scale, plan, final, sequences.partition)
    else:
        grads = _gradients(operands, sequences, outgoing, scale, plan)
    return [grad for grad in grads if grad is not None]


@chunkwise_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    do,
    dblocks,
    q,
    k,
    v,
    log_decay,
    beta,
    level_scales,
    initial,
    cu_seqlens,
    starts,
    inverse,
    cumulative,
    scale,
    chunk_size,
    final,
    partition,
):
    inputs = [x for x in (q, k, v, log_decay, beta, level_scales) if x is not None]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    if initial is None:
        return grads
    return [*grads, torch.empty_like(initial, dtype=torch.float32, memory_format=torch.contiguous_format)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, chunk_size, final, partition = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # or the inverses, which have none, would get zeros
    ctx.options = scale, chunk_size, final, partition


def _twin(x: Operands, sequences: Sequences, scale: float, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The outputs and blocks of `chunkwise` by the stages of kernels.torch in float32, which autograd can record."""
    cu_seqlens, starts, final, partition = sequences
    rows, C = x.q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, chunk_size or 64
    buffered = 0 if starts is None else rows * C
    count = x.q.shape[0] * x.q.shape[1] if cu_seqlens is None else int(cu_seqlens[-1])  # packed rows may end in padding

    def tokens(y: Tensor) -> Tensor:
        new = y.flatten(0, 1)[:count].float()
        return torch.cat([new.new_zeros(buffered, *new.shape[1:]), new])

    output, blocks = stages(
        tokens(x.q) * scale,
        tokens(x.k),
        tokens(x.v),
        tokens(x.log_decay.clamp(min=MIN_LOG_DECAY)),
        None if x.beta is None else tokens(x.beta),
        tokens(x.level_scales),
        None if x.initial is None else x.initial.float(),
        None if starts is None else starts * C,
        cu_seqlens,
        rows,
        C,
        final,
        partition.numbers,
    )
    padding = output.new_zeros(x.v.shape[0] * x.v.shape[1] - count, *output.shape[1:])
    return torch.cat([output[buffered:], padding]).view(x.v.shape).to(x.v.dtype), blocks


def _backward(ctx: Any, do: Tensor | None, dblocks: Tensor | None, *unused: None):  # type: ignore[no-untyped-def]
    inputs = ctx.saved_tensors  # once: checkpointing refuses to give them twice
    scale, chunk_size, final, partition = ctx.options
    if torch.is_grad_enabled():  # create_graph=True
        sequences = Sequences(inputs[7], inputs[8], final, Partition.of(partition))
        grads = recorded_gradients(
            lambda *x: _twin(Operands(*x), sequences, scale, chunk_size), inputs[:7], (do, dblocks)
        )
        return *grads, None, None, None, None, None, None
    v, beta, initial = inputs[2], inputs[4], inputs[6]
    do = torch.zeros_like(v, memory_format=torch.contiguous_format) if do is None else do
    found = iter(chunkwise_backward(do, dblocks if final else None, *inputs, *ctx.options))
    first, dbeta = [next(found) for _ in range(4)], None if beta is None else next(found)
    dlevel_scales, dinitial = next(found), None if initial is None else next(found).to(initial.dtype)
    return *first, dbeta, dlevel_scales, dinitial, None, None, None, None, None, None


chunkwise.register_autograd(_backward, setup_context=_save)
