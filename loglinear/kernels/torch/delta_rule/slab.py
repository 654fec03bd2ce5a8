"""The delta rule's stages in order, and their adjoints in the opposite order."""

# H heads of a slab, n chunks, C chunk, K key, V value, L levels, N sequences, M blocks
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.torch.delta_rule.chunk import chunk_backward, chunk_quantities, chunk_state, queries
from loglinear.kernels.torch.delta_rule.up_sweep import up_sweep, up_sweep_backward
from loglinear.kernels.torch.delta_rule.walk import walk, walk_backward
from loglinear.kernels.torch.slab import Slab, Walk
from loglinear.kernels.torch.workspace import empty, zeros


class DeltaRuleSlab(Slab):
    def build(self, *rest: Tensor) -> None:
        (self.beta,) = rest
        self.chunk = chunk_quantities(self.k, self.beta, self.gate)
        H, n, _, K = self.k.shape
        self.slots = empty(self.v, H, self.schedule.num_rows, K, K + self.v.shape[3])
        chunk_state(self.chunk, self.v, out=self.slots[:, :n])
        self.slots[:, n:, :, :K] = torch.eye(K, dtype=self.v.dtype, device=self.v.device)
        if self.initial is not None:
            self.slots[:, self.schedule.initial, :, K:] = self.initial
        self.rights = up_sweep(self.slots, self.schedule)

    def read_past(self) -> tuple[Tensor, Walk]:
        out, q_in = queries(self.chunk, self.q, self.k, self.v, self.mask())
        return out, walk(q_in, self.slots, self.schedule.reads)

    def read_ends(self) -> Walk:
        return walk(self.identity(), self.slots, self.schedule.final_reads)

    def backward(self, do: Tensor, dblocks: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        dscales = zeros(self.level_scales, *self.level_scales.shape)
        dslots = zeros(self.slots, *self.slots.shape)
        _, q_in = queries(self.chunk, self.q, self.k, self.v, self.mask())
        dq_in = walk_backward(q_in, self.slots, self.schedule.turns, self.pull_output(do, dscales), dslots)
        if dblocks is not None:
            pull = self.pull_blocks(dblocks)
            walk_backward(self.identity(), self.slots, [self.schedule.final_reads], pull, dslots)
        up_sweep_backward(self.slots, self.rights, dslots, self.schedule)

        n, K = self.k.shape[1], self.k.shape[3]
        dq, dk, dv, dbeta, dlog_decay = chunk_backward(
            self.chunk,
            self.q,
            self.k,
            self.v,
            self.beta,
            self.mask(),
            do,
            dq_in,
            dslots[:, :n],
            self.pull_mask(dscales),
        )
        return (dq, dk, dv, self.of_tokens(dlog_decay), dbeta, dscales), dslots[:, self.schedule.initial, :, K:]
