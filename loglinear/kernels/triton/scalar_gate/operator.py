"""The operator as torch sees it: registered with fakes and an autograd formula, so that torch.compile, checkpointing
and CUDA graphs treat it as one node. Nothing in it waits for the device."""

# B batch, T time, G groups, H heads, K key, V value, L levels, N sequences, M blocks
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loglinear.fenwick import num_blocks
from loglinear.kernels.triton.config import Plan, choose
from loglinear.kernels.triton.scalar_gate.launch import ScalarGate, common_dtype, gradients


def _plan(direction: str, q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> Plan:
    return choose(direction, q.shape[3], v.shape[3], common_dtype(q, k, v), q.shape[1], v.device, chunk_size or None)


@torch.library.custom_op("loglinear::scalar_gate", mutates_args=())
def scalar_gate(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_scales: Tensor, nodes: Tensor | None,
    cu_seqlens: Tensor | None, starts: Tensor | None, scale: float, chunk_size: int, final: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [B,T,H,V] and, with `final`, each sequence's block states at the start of its unfinished chunk
    [N,M,H,K,V] float32 (else an empty tensor).

    nodes [N,M,H,K,V], starts [N]: the block states before each packed sequence's first chunk, and that chunk's number.
    chunk_size 0 lets the table choose; with `final` or nodes it is the states' chunk size.
    """
    plan = _plan("forward", q, k, v, chunk_size)
    call = ScalarGate(q, k, v, log_decay, level_scales, nodes, cu_seqlens, starts, scale, plan)
    call.build_states()
    return call.output(), call.final_blocks() if final else call.empty(0)


@scalar_gate.register_fake
def _(q, k, v, log_decay, level_scales, nodes, cu_seqlens, starts, scale, chunk_size, final):  # type: ignore[no-untyped-def]
    if not final:
        return torch.empty_like(v, memory_format=torch.contiguous_format), v.new_empty(0, dtype=torch.float32)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, num_blocks(level_scales.shape[3], chunk_size), v.shape[2], q.shape[3], v.shape[3])
    return torch.empty_like(v, memory_format=torch.contiguous_format), v.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("loglinear::scalar_gate_backward", mutates_args=())
def scalar_gate_backward(
    do: Tensor, dblocks: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_scales: Tensor,
    nodes: Tensor | None, cu_seqlens: Tensor | None, starts: Tensor | None, scale: float, chunk_size: int,
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv, dlog_decay, dlevel_scales, and dnodes where there are nodes."""
    plan = _plan("backward", q, k, v, chunk_size)
    grads = gradients(do, dblocks, q, k, v, log_decay, level_scales, nodes, cu_seqlens, starts, scale, plan)
    return [grad for grad in grads if grad is not None]


@scalar_gate_backward.register_fake
def _(do, dblocks, q, k, v, log_decay, level_scales, nodes, cu_seqlens, starts, scale, chunk_size):  # type: ignore[no-untyped-def]
    inputs = [q, k, v, log_decay, level_scales]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    return (
        grads
        if nodes is None
        else [*grads, torch.empty_like(nodes, dtype=torch.float32, memory_format=torch.contiguous_format)]
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, chunk_size, final = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = scale, chunk_size
    ctx.final = final


def _backward(ctx: Any, do: Tensor, dblocks: Tensor):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, level_scales, nodes, cu_seqlens, starts = ctx.saved_tensors
    grads = scalar_gate_backward(
        do, dblocks if ctx.final else None, q, k, v, log_decay, level_scales, nodes, cu_seqlens, starts, *ctx.options
    )
    dnodes = None if nodes is None else grads[5].to(nodes.dtype)
    return *grads[:5], dnodes, None, None, None, None, None


scalar_gate.register_autograd(_backward, setup_context=_save)
