"""The gate's stages in order, and their adjoints in the opposite order."""

# H heads of a slab, n chunks, C chunk, K key, V value, L levels, N sequences, M blocks, D decays of a token
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.torch.scalar_gate.chunk_state import chunk_state, chunk_state_backward
from loglinear.kernels.torch.scalar_gate.in_chunk import in_chunk, in_chunk_backward
from loglinear.kernels.torch.scalar_gate.up_sweep import up_sweep, up_sweep_backward
from loglinear.kernels.torch.scalar_gate.walk import walk, walk_backward
from loglinear.kernels.torch.slab import Slab, Walk
from loglinear.kernels.torch.workspace import empty, product, zeros


class ScalarGateSlab(Slab):
    def build(self, *rest: Tensor) -> None:
        H, n, _, K = self.k.shape
        self.states = empty(self.v, H, self.schedule.num_rows, K, self.v.shape[3])
        self.log_p = self.v.new_zeros(H, self.schedule.num_rows, self.gate.log_decay.shape[-1])
        self.log_p[:, :n] = chunk_state(self.gate, self.k, self.v, out=self.states[:, :n])
        if self.initial is not None:
            self.states[:, self.schedule.initial] = self.initial
        self.rights = up_sweep(self.states, self.log_p, self.schedule)

    def q_in(self) -> Tensor:
        """diag(exp(G)) Q [H, n, C, K], the queries as an incoming state sees them."""
        return product(self.q, self.gate.from_start)

    def read_past(self) -> tuple[Tensor, Walk]:
        out = in_chunk(self.gate, self.q, self.k, self.v, self.mask())
        return out, walk(self.q_in(), self.states, self.log_p, self.schedule.reads)

    def read_ends(self) -> Walk:
        return walk(self.identity(), self.states, self.log_p, self.schedule.final_reads)

    def backward(self, do: Tensor, dblocks: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        dscales = zeros(self.level_scales, *self.level_scales.shape)
        dstates, dlog_p = zeros(self.states, *self.states.shape), torch.zeros_like(self.log_p)
        arrays, gradients, reads = (self.states, self.log_p), (dstates, dlog_p), self.schedule.reads
        q_in = self.q_in()
        dq_in = walk_backward(q_in, *arrays, reads, self.pull_output(do, dscales), *gradients)
        if dblocks is not None:
            walk_backward(self.identity(), *arrays, self.schedule.final_reads, self.pull_blocks(dblocks), *gradients)
        up_sweep_backward(*arrays, self.rights, *gradients, self.schedule)

        n = self.k.shape[1]
        dk, dv, flow_out = chunk_state_backward(self.gate, self.k, self.v, dstates[:, :n])
        dlog_decay = self.gate.gradient(self.gate.flow(q_in, dq_in), flow_out, dlog_p[:, :n])
        dq = dq_in.mul_(self.gate.from_start)
        dlog_decay += in_chunk_backward(
            self.gate, (self.q, self.k, self.v), self.mask(), do, self.pull_mask(dscales), (dq, dk, dv)
        )
        return (dq, dk, dv, self.of_tokens(dlog_decay), dscales), dstates[:, self.schedule.initial]
