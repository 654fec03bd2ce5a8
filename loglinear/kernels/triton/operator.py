"""The operators as torch sees them: one node, registered with fakes and an autograd formula, so that torch.compile,
checkpointing and CUDA graphs work. Nothing in it waits for the device."""

# B batch, T time, G groups, H heads, K key, V value, L levels, N sequences, M blocks
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loglinear.fenwick import num_blocks
from loglinear.kernels import MIN_LOG_DECAY
from loglinear.kernels.torch.gradients import recorded_gradients
from loglinear.kernels.torch.operator import stages
from loglinear.kernels.triton import delta_rule, scalar_gate
from loglinear.kernels.triton.config import Plan, choose
from loglinear.kernels.triton.inputs import Operands, Sequences, common_dtype
from loglinear.partition import FENWICK


def _plan(direction: str, q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> Plan:
    return choose(direction, q.shape[3], v.shape[3], common_dtype(q, k, v), q.shape[1], v.device, chunk_size or None)


@torch.library.custom_op("loglinear::chunkwise", mutates_args=())
def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, level_scales: Tensor,
    nodes: Tensor | None, cu_seqlens: Tensor | None, starts: Tensor | None, scale: float, chunk_size: int, final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs [B,T,H,V]; with `final`, each sequence's block states at the start of its unfinished chunk [N,M,H,K,V]
    float32; of the delta rule what the backward takes from the forward, each chunk's inverse [chunk,H,C,C] and its
    cumulative log decay [chunk,H,C]; else empty tensors. The delta rule with beta, else the scalar gate.

    nodes [N,M,H,K,V], starts [N]: the block states before each packed sequence's first chunk, and that chunk's number.
    chunk_size 0 leaves the choice to the kernels; with `final` or nodes it is the states' chunk size.
    """
    if beta is None:
        plan = _plan("forward", q, k, v, chunk_size)
        operands = Operands(q, k, v, log_decay, None, level_scales, nodes)
        x = scalar_gate.inputs_of(operands, Sequences(cu_seqlens, starts), scale, plan)
        output, blocks = scalar_gate.forward(x, plan, final=final)
        return output, x.empty(0) if blocks is None else blocks, x.empty(0), x.empty(0)
    C = delta_rule.choose_chunk_size(q, k, v, chunk_size)
    call = delta_rule.DeltaRule(q, k, v, log_decay, beta, level_scales, nodes, cu_seqlens, starts, scale, C, final)
    inverse, cumulative = call.invert()
    call.build_states()
    return call.output(), call.final_blocks() if final else call.empty(0), inverse, cumulative


@chunkwise.register_fake
def _(q, k, v, log_decay, beta, level_scales, nodes, cu_seqlens, starts, scale, chunk_size, final):  # type: ignore[no-untyped-def]
    H, rows = v.shape[2], q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    blocks, inverse, cumulative = (v.new_empty(0, dtype=torch.float32) for _ in range(3))
    if final:
        M = num_blocks(level_scales.shape[3], chunk_size)
        blocks = v.new_empty((rows, M, H, q.shape[3], v.shape[3]), dtype=torch.float32)
    if beta is not None:
        C = delta_rule.choose_chunk_size(q, k, v, chunk_size)
        chunks = delta_rule.count_chunks(q.shape[0], q.shape[1], C, None if cu_seqlens is None else rows, final)
        inverse = v.new_empty((chunks, H, C, C), dtype=delta_rule.state_dtype(q, k, v))
        cumulative = v.new_empty((chunks, H, C), dtype=torch.float32)
    return output, blocks, inverse, cumulative


@torch.library.custom_op("loglinear::chunkwise_backward", mutates_args=())
def chunkwise_backward(
    do: Tensor, dblocks: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None,
    level_scales: Tensor, nodes: Tensor | None, cu_seqlens: Tensor | None, starts: Tensor | None, inverse: Tensor,
    cumulative: Tensor, scale: float, chunk_size: int, final: bool,
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv, dlog_decay, dbeta where there is beta, dlevel_scales, and dnodes where there are nodes."""
    grads: tuple[Tensor | None, ...]
    if beta is None:
        plan = _plan("backward", q, k, v, chunk_size)
        operands = Operands(q, k, v, log_decay, None, level_scales, nodes)
        outgoing = scalar_gate.Outgoing(do, dblocks)
        grads = scalar_gate.gradients(operands, Sequences(cu_seqlens, starts), outgoing, scale, plan)
    else:
        C = delta_rule.choose_chunk_size(q, k, v, chunk_size)
        grads = delta_rule.gradients(
            do, dblocks, inverse, cumulative, q, k, v, log_decay, beta, level_scales, nodes, cu_seqlens, starts, scale,
            C, final,
        )  # fmt: skip
    return [grad for grad in grads if grad is not None]


@chunkwise_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    do, dblocks, q, k, v, log_decay, beta, level_scales, nodes, cu_seqlens, starts, inverse, cumulative, scale,
    chunk_size, final,
):  # fmt: skip
    inputs = [x for x in (q, k, v, log_decay, beta, level_scales) if x is not None]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    if nodes is None:
        return grads
    return [*grads, torch.empty_like(nodes, dtype=torch.float32, memory_format=torch.contiguous_format)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, chunk_size, final = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # or the inverses, which have none, would get zeros
    ctx.options = scale, chunk_size, final


def _twin(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, level_scales: Tensor,
    nodes: Tensor | None, cu_seqlens: Tensor | None, starts: Tensor | None, scale: float, chunk_size: int, final: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The outputs and blocks of `chunkwise` by the stages of kernels.torch in float32, which autograd can record."""
    rows, C = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, chunk_size or 64
    held = 0 if starts is None else rows * C
    count = q.shape[0] * q.shape[1] if cu_seqlens is None else int(cu_seqlens[-1])  # packed rows may end in padding

    def tokens(x: Tensor) -> Tensor:
        new = x.flatten(0, 1)[:count].float()
        return torch.cat([new.new_zeros(held, *new.shape[1:]), new])

    output, blocks = stages(
        tokens(q) * scale, tokens(k), tokens(v), tokens(log_decay.clamp(min=MIN_LOG_DECAY)),
        None if beta is None else tokens(beta), tokens(level_scales), None if nodes is None else nodes.float(),
        None if starts is None else starts * C, cu_seqlens, rows, C, final, FENWICK.numbers,
    )  # fmt: skip
    padding = output.new_zeros(v.shape[0] * v.shape[1] - count, *output.shape[1:])
    return torch.cat([output[held:], padding]).view(v.shape).to(v.dtype), blocks


def _backward(ctx: Any, do: Tensor | None, dblocks: Tensor | None, *unused: None):  # type: ignore[no-untyped-def]
    inputs = ctx.saved_tensors  # once: checkpointing refuses to give them twice
    if torch.is_grad_enabled():  # create_graph=True
        options = (*inputs[7:9], *ctx.options)
        grads = recorded_gradients(lambda *x: _twin(*x, *options), inputs[:7], (do, dblocks))
        return *grads, None, None, None, None, None
    v, beta, nodes = inputs[2], inputs[4], inputs[6]
    final = ctx.options[-1]
    do = torch.zeros_like(v, memory_format=torch.contiguous_format) if do is None else do
    given = iter(chunkwise_backward(do, dblocks if final else None, *inputs, *ctx.options))
    first, dbeta = [next(given) for _ in range(4)], None if beta is None else next(given)
    dlevel_scales, dnodes = next(given), None if nodes is None else next(given).to(nodes.dtype)
    return *first, dbeta, dlevel_scales, dnodes, None, None, None, None, None


chunkwise.register_autograd(_backward, setup_context=_save)
