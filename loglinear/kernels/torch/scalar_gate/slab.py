"""The scalar gate's stages in order, and their adjoints in the opposite order."""

# H heads of a slab, n chunks, C chunk, K key, V value, L levels, N sequences, M blocks
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.torch.chunks import reverse_cumsum
from loglinear.kernels.torch.scalar_gate.chunk_state import chunk_state, chunk_state_backward
from loglinear.kernels.torch.scalar_gate.in_chunk import in_chunk, in_chunk_backward
from loglinear.kernels.torch.scalar_gate.up_sweep import up_sweep, up_sweep_backward
from loglinear.kernels.torch.scalar_gate.walk import walk, walk_backward
from loglinear.kernels.torch.schedule import Read
from loglinear.kernels.torch.slab import Slab
from loglinear.kernels.torch.workspace import empty, product, take, zeros


class ScalarGateSlab(Slab):
    def build(self, *rest: Tensor) -> None:
        H, n, _, K = self.k.shape
        self.cumulative = self.log_decay.cumsum(-1)  # G: the decay from the chunk's start, as a logarithm
        self.states = empty(self.v, H, self.schedule.num_rows, K, self.v.shape[3])
        self.log_p = self.v.new_zeros(H, self.schedule.num_rows)
        self.log_p[:, :n] = chunk_state(self.k, self.v, self.log_decay, out=self.states[:, :n])
        if self.initial is not None:
            self.states[:, self.schedule.initial] = self.initial
        self.rights = up_sweep(self.states, self.log_p, self.schedule)

    def weight(self, read: Read, path: Tensor) -> tuple[Tensor, Tensor]:
        """lambda [H, readers, C] of a read, and the decay from the block's end to the query."""
        scales = take(self.level_scales[..., read.column], read.readers)
        return scales, (take(self.cumulative, read.readers) + path[..., None]).exp_()

    def output(self) -> Tensor:
        out = in_chunk(self.q, self.k, self.v, self.log_decay, self.mask())
        for read, y, path in walk(self.q, self.states, self.log_p, self.schedule.reads):
            scales, decay = self.weight(read, path)
            out.index_add_(1, read.readers.flatten(), y.mul_((decay * scales)[..., None]))
        return out

    def final_blocks(self, out: Tensor) -> None:
        for read, y, path in walk(self.identity(), self.states, self.log_p, self.schedule.final_reads):
            out[read.readers.flatten(), read.column] = y.mul_(path.exp()[..., None, None]).transpose(0, 1)

    def backward(self, do: Tensor, dblocks: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        dscales = zeros(self.level_scales, *self.level_scales.shape)
        dq, dk, dv, dcumulative = in_chunk_backward(
            self.q, self.k, self.v, self.log_decay, self.mask(), do, self.pull_mask(dscales)
        )
        dstates, dlog_p = zeros(self.states, *self.states.shape), torch.zeros_like(self.log_p)

        def pull_output(read: Read, y: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
            readers = read.readers.flatten()
            scales, decay = self.weight(read, path)
            dy = take(do, readers)
            dweight = product(dy, y).sum(-1).mul_(decay)
            dscales[..., read.column].index_add_(1, readers, dweight)
            dlog = dweight.mul_(scales)
            dcumulative.index_add_(1, readers, dlog)
            return dy.mul_(decay.mul_(scales)[..., None]), dlog.sum(-1)

        def pull_blocks(read: Read, y: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
            assert dblocks is not None
            dy = dblocks[read.readers.flatten(), read.column].transpose(0, 1) * path.exp()[..., None, None]
            return dy, (dy * y).sum((-1, -2))

        reads, final_reads = self.schedule.reads, self.schedule.final_reads
        walk_backward(self.q, self.states, self.log_p, reads, pull_output, dq, dstates, dlog_p)
        if dblocks is not None:
            x = self.identity()
            walk_backward(x, self.states, self.log_p, final_reads, pull_blocks, torch.zeros_like(x), dstates, dlog_p)
        up_sweep_backward(self.states, self.log_p, self.rights, dstates, dlog_p, self.schedule)

        n = self.k.shape[1]
        dk_state, dv_state, dcumulative_state = chunk_state_backward(
            self.k, self.v, self.log_decay, dstates[:, :n], dlog_p[:, :n]
        )
        dlog_decay = reverse_cumsum(dcumulative.add_(dcumulative_state))
        return (dq, dk.add_(dk_state), dv.add_(dv_state), dlog_decay, dscales), dstates[:, self.schedule.initial]
