"""The forward in the steps of `scalar_gate/forward.py`. It keeps nothing but its inputs."""

# B batch, T time, G groups, K key, L columns, N sequences, M blocks
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.triton.bucket_scores.chunk_sums import chunk_sums
from loglinear.kernels.triton.bucket_scores.inputs import Inputs, inputs_of, slabs_of
from loglinear.kernels.triton.bucket_scores.read import read
from loglinear.kernels.triton.inputs import Sequences
from loglinear.kernels.triton.scalar_gate.final_blocks import final_blocks
from loglinear.kernels.triton.scalar_gate.states import States
from loglinear.kernels.triton.scalar_gate.sweep import up_sweep


def build_sums(x: Inputs) -> States:
    """Return the Fenwick array. Without decay all logarithms are 0."""
    y, H = x.layout, x.groups
    slots = chunk_sums(x, x.plan["chunk_sums"])
    nothing = slots.new_zeros(len(y.runs) + 2, y.chunks, H, dtype=torch.float32)
    states = States(slots, x.initial, nothing[-1], nothing[:-1], x.empty(y.chunks, H, x.chunk_size))
    return up_sweep(x, states, x.plan["up_sweep"])


def forward(
    q: Tensor,
    k: Tensor,
    initial: Tensor | None,
    sequences: Sequences,
    first: Tensor | None,
    num_columns: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Return the scores [B,T,G,L], and if the call asks for them the blocks [N,M,G,K,K], slab by slab of groups."""
    scores, blocks = q.new_zeros(*q.shape[:3], num_columns, dtype=torch.float32), []
    for g in slabs_of(q, k, sequences, chunk_size):
        own = None if initial is None else initial[:, :, g]
        x = inputs_of(q[:, :, g], k[:, :, g], own, scores[:, :, g], sequences, first, chunk_size)
        states = build_sums(x)
        read(x, states, scores[:, :, g], x.plan["read"])
        if sequences.final:
            blocks.append(final_blocks(x, states))
    return scores, torch.cat(blocks, 2) if blocks else None
