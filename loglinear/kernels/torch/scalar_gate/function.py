"""The scalar-gate operator, forward and backward, one slab of heads after the other.

Backward keeps the inputs alone and recomputes the states: that costs about a fifth of its time and saves as much
memory as v and the slots take.
"""

# tokens: all sequences' tokens in one row; G groups, H heads, K key, V value, L levels, N sequences, M blocks
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loglinear.kernels.torch.scalar_gate.chunk_state import chunk_state, chunk_state_backward
from loglinear.kernels.torch.scalar_gate.in_chunk import in_chunk, in_chunk_backward
from loglinear.kernels.torch.scalar_gate.up_sweep import up_sweep, up_sweep_backward
from loglinear.kernels.torch.scalar_gate.walk import walk, walk_backward
from loglinear.kernels.torch.schedule import Read, Schedule
from loglinear.kernels.torch.tiles import from_chunks, reverse_cumsum, slabs, take, to_chunks


def scalar_gate(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_scales: Tensor, nodes: Tensor | None, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """q, k [tokens,G,K]; v [tokens,H,V]; log_decay [tokens,H]; level_scales [tokens,H,L]; nodes [N,M,H,K,V] or None.

    Returns the outputs [tokens,H,V] and each sequence's block states at its last chunk's start [N,M',H,K,V],
    M' as many as the schedule's final reads name.
    """
    return ScalarGate.apply(q, k, v, log_decay, level_scales, nodes, schedule)


class ScalarGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, log_decay, level_scales, nodes, schedule):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v, log_decay, level_scales, nodes)
        ctx.schedule = schedule
        out = torch.zeros_like(v, memory_format=torch.contiguous_format)
        blocks = v.new_zeros(schedule.num_sequences, schedule.num_blocks, v.shape[1], q.shape[2], v.shape[2])
        for heads in slabs(v.shape[1], q.shape[1], schedule, max(q.shape[2], v.shape[2]), v):
            slab = Slab(q, k, v, log_decay, level_scales, nodes, schedule, heads)
            from_chunks(slab.output(), out, heads, schedule)
            slab.final_blocks(blocks[:, :, heads])
        return out, blocks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, dblocks):  # type: ignore[no-untyped-def]
        inputs, schedule = ctx.saved_tensors, ctx.schedule
        q, _, v, *_ = inputs
        grads = [None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
        for heads in slabs(v.shape[1], q.shape[1], schedule, max(q.shape[2], v.shape[2]), v):
            Slab(*inputs, schedule, heads).backward(dout, dblocks[:, :, heads], grads)
        return *grads, None


class Slab:
    """Some heads' chunks, states and slots."""

    def __init__(self, q, k, v, log_decay, level_scales, nodes, schedule: Schedule, heads: slice) -> None:  # type: ignore[no-untyped-def]
        self.schedule, self.heads, self.R = schedule, heads, v.shape[1] // q.shape[1]
        self.q, self.k = (to_chunks(x, heads, schedule, self.R) for x in (q, k))
        self.v, self.level_scales = (to_chunks(x, heads, schedule) for x in (v, level_scales))
        self.cumulative = to_chunks(log_decay, heads, schedule).cumsum(-1)
        H, n, _, K = self.k.shape
        self.states = v.new_empty(H, schedule.num_rows, K, v.shape[2])
        self.log_p = v.new_zeros(H, schedule.num_rows)
        self.log_p[:, :n] = chunk_state(self.k, self.v, self.cumulative, out=self.states[:, :n])
        if nodes is not None:
            self.states[:, n:] = nodes[:, :, heads].flatten(0, 1).transpose(0, 1)
        self.rights = up_sweep(self.states, self.log_p, schedule)

    def weight(self, read: Read, path: Tensor) -> tuple[Tensor, Tensor]:
        """lambda [H, readers, C] of a read, and the decay from the block's end to the query."""
        scales = take(self.level_scales[..., read.level], read.readers)
        return scales, (take(self.cumulative, read.readers) + path[..., None]).exp_()

    def output(self) -> Tensor:
        out = in_chunk(self.q, self.k, self.v, self.cumulative, self.level_scales)
        for read, y, path in walk(self.q, self.states, self.log_p, self.schedule.reads):
            scales, decay = self.weight(read, path)
            out.index_add_(1, read.readers.flatten(), y.mul_(decay.mul_(scales)[..., None]))
        return out

    def identity(self) -> Tensor:
        """The X of the final blocks' walk: one K x K identity per sequence."""
        K = self.q.shape[-1]
        eye = torch.eye(K, dtype=self.q.dtype, device=self.q.device)
        return eye.expand(len(self.q), self.schedule.num_sequences, K, K)

    def final_blocks(self, out: Tensor) -> None:
        """The states that a sequence leaves: the same walk with X = I. Writes out [N, M, H, K, V]."""
        for read, y, path in walk(self.identity(), self.states, self.log_p, self.schedule.final_reads):
            out[read.readers.flatten(), read.level] = y.mul_(path.exp()[..., None, None]).transpose(0, 1)

    def backward(self, dout: Tensor, dblocks: Tensor, grads: list[Tensor | None]) -> None:
        schedule, heads = self.schedule, self.heads
        do = to_chunks(dout, heads, schedule)
        dscales = torch.zeros_like(self.level_scales)
        dq, dk, dv, dcumulative = in_chunk_backward(
            self.q, self.k, self.v, self.cumulative, self.level_scales, do, dscales
        )
        dstates, dlog_p = torch.zeros_like(self.states), torch.zeros_like(self.log_p)

        def pull_output(read: Read, y: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
            readers = read.readers.flatten()
            scales, decay = self.weight(read, path)
            dy = take(do, readers)
            dweight = (dy * y).sum(-1).mul_(decay)
            dscales[..., read.level].index_add_(1, readers, dweight)
            flow = dweight.mul_(scales)
            dcumulative.index_add_(1, readers, flow)
            return dy.mul_(decay.mul_(scales)[..., None]), flow.sum(-1)

        def pull_blocks(read: Read, y: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
            dy = dblocks[read.readers.flatten(), read.level].transpose(0, 1) * path.exp()[..., None, None]
            return dy, (dy * y).sum((-1, -2))

        walk_backward(self.q, self.states, self.log_p, schedule.reads, pull_output, dq, dstates, dlog_p)
        identity = self.identity()
        unused = torch.zeros_like(identity, memory_format=torch.contiguous_format)
        walk_backward(identity, self.states, self.log_p, schedule.final_reads, pull_blocks, unused, dstates, dlog_p)
        up_sweep_backward(self.states, self.log_p, self.rights, dstates, dlog_p, schedule)

        n = self.k.shape[1]
        dk_state, dv_state, dcumulative_state = chunk_state_backward(
            self.k, self.v, self.cumulative, dstates[:, :n], dlog_p[:, :n]
        )
        dlog_decay = reverse_cumsum(dcumulative.add_(dcumulative_state))
        parts = (dq, dk.add_(dk_state), dv.add_(dv_state), dlog_decay, dscales)
        for part, grad, R in zip(parts, grads, (self.R, self.R, 1, 1, 1), strict=False):
            assert grad is not None
            from_chunks(part, grad, heads, schedule, R)
        if grads[5] is not None:
            grads[5][:, :, heads] = dstates[:, n:].transpose(0, 1).unflatten(0, grads[5].shape[:2])
