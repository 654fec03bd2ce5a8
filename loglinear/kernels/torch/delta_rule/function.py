"""The delta-rule operator, forward and backward, one slab of heads after the other.

Backward keeps the inputs alone and recomputes the chunk quantities and states.
"""

# tokens: all sequences' tokens in one row; G groups, H heads, K key, V value, L levels, N sequences, M blocks
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loglinear.kernels.torch.delta_rule.chunk import chunk_backward, chunk_quantities, chunk_state, queries
from loglinear.kernels.torch.delta_rule.up_sweep import up_sweep, up_sweep_backward
from loglinear.kernels.torch.delta_rule.walk import walk, walk_backward
from loglinear.kernels.torch.schedule import Read, Schedule
from loglinear.kernels.torch.tiles import from_chunks, reverse_cumsum, slabs, take, to_chunks


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    level_scales: Tensor,
    nodes: Tensor | None,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """As `scalar_gate`, with beta [tokens, H]."""
    return DeltaRule.apply(q, k, v, log_decay, beta, level_scales, nodes, schedule)


class DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, log_decay, beta, level_scales, nodes, schedule):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v, log_decay, beta, level_scales, nodes)
        ctx.schedule = schedule
        out = torch.zeros_like(v, memory_format=torch.contiguous_format)
        blocks = v.new_zeros(schedule.num_sequences, schedule.num_blocks, v.shape[1], q.shape[2], v.shape[2])
        for heads in slabs(v.shape[1], q.shape[1], schedule, q.shape[2] + v.shape[2], v):
            slab = Slab(q, k, v, log_decay, beta, level_scales, nodes, schedule, heads)
            from_chunks(slab.output(), out, heads, schedule)
            slab.final_blocks(blocks[:, :, heads])
        return out, blocks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, dblocks):  # type: ignore[no-untyped-def]
        inputs, schedule = ctx.saved_tensors, ctx.schedule
        q, _, v, *_ = inputs
        grads = [None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
        for heads in slabs(v.shape[1], q.shape[1], schedule, q.shape[2] + v.shape[2], v):
            Slab(*inputs, schedule, heads).backward(dout, dblocks[:, :, heads], grads)
        return *grads, None


class Slab:
    """Some heads' chunks and slots."""

    def __init__(self, q, k, v, log_decay, beta, level_scales, nodes, schedule: Schedule, heads: slice) -> None:  # type: ignore[no-untyped-def]
        self.schedule, self.heads, self.R = schedule, heads, v.shape[1] // q.shape[1]
        self.q, self.k = (to_chunks(x, heads, schedule, self.R) for x in (q, k))
        self.v, self.beta, self.level_scales = (to_chunks(x, heads, schedule) for x in (v, beta, level_scales))
        self.cumulative = to_chunks(log_decay, heads, schedule).cumsum(-1)
        self.chunk = chunk_quantities(self.k, self.beta, self.cumulative)
        H, n, _, K = self.k.shape
        self.slots = v.new_empty(H, schedule.num_rows, K, K + v.shape[2])
        chunk_state(self.chunk, self.v, out=self.slots[:, :n])
        if nodes is not None:
            self.slots[:, n:, :, :K] = torch.eye(K, dtype=v.dtype, device=v.device)
            self.slots[:, n:, :, K:] = nodes[:, :, heads].flatten(0, 1).transpose(0, 1)
        self.rights = up_sweep(self.slots, schedule)

    def output(self) -> Tensor:
        out, seen = queries(self.chunk, self.q, self.k, self.v, self.level_scales)
        for read, y in walk(seen, self.slots, self.schedule.reads):
            scales = take(self.level_scales[..., read.level], read.readers)
            out.index_add_(1, read.readers.flatten(), y * scales[..., None])
        return out

    def identity(self) -> Tensor:
        """The X of the final blocks' walk: one K x K identity per sequence."""
        K = self.q.shape[-1]
        eye = torch.eye(K, dtype=self.q.dtype, device=self.q.device)
        return eye.repeat(len(self.q), self.schedule.num_sequences, 1, 1)

    def final_blocks(self, out: Tensor) -> None:
        """The states that a sequence leaves: the same walk with X = I. Writes out [N, M, H, K, V]."""
        for read, y in walk(self.identity(), self.slots, self.schedule.final_reads):
            out[read.readers.flatten(), read.level] = y.transpose(0, 1)

    def backward(self, dout: Tensor, dblocks: Tensor, grads: list[Tensor | None]) -> None:
        schedule, heads = self.schedule, self.heads
        do = to_chunks(dout, heads, schedule)
        dscales, dslots = torch.zeros_like(self.level_scales), torch.zeros_like(self.slots)

        def pull_output(read: Read, y: Tensor) -> Tensor:
            readers = read.readers.flatten()
            dy = take(do, readers)
            dscales[..., read.level].index_add_(1, readers, (dy * y).sum(-1))
            return dy.mul_(take(self.level_scales[..., read.level], readers)[..., None])

        def pull_blocks(read: Read, y: Tensor) -> Tensor:
            return dblocks[read.readers.flatten(), read.level].transpose(0, 1)

        _, seen = queries(self.chunk, self.q, self.k, self.v, self.level_scales)
        dseen = walk_backward(seen, self.slots, schedule.reads, pull_output, dslots)
        walk_backward(self.identity(), self.slots, schedule.final_reads, pull_blocks, dslots)
        up_sweep_backward(self.slots, self.rights, dslots, schedule)
        n, K = self.k.shape[1], self.k.shape[3]
        dq, dk, dv, dbeta, dcumulative = chunk_backward(
            self.chunk, self.q, self.k, self.v, self.beta, self.level_scales, do, dseen, dslots[:, :n], dscales
        )
        parts = (dq, dk, dv, reverse_cumsum(dcumulative), dbeta, dscales)
        for part, grad, R in zip(parts, grads, (self.R, self.R, 1, 1, 1, 1), strict=False):
            assert grad is not None
            from_chunks(part, grad, heads, schedule, R)
        if grads[6] is not None:
            grads[6][:, :, heads] = dslots[:, n:, :, K:].transpose(0, 1).unflatten(0, grads[6].shape[:2])
