"""The backward: each stage is the adjoint of one forward stage, in the opposite order."""

# B batch, T time, G groups, K key, L columns, N sequences, M blocks
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.triton.bucket_scores.forward import build_sums
from loglinear.kernels.triton.bucket_scores.inputs import Inputs, inputs_of, partial_bytes, slabs_of
from loglinear.kernels.triton.bucket_scores.keys_backward import keys_backward
from loglinear.kernels.triton.bucket_scores.read_backward import read_backward
from loglinear.kernels.triton.inputs import Sequences, in_rows, like
from loglinear.kernels.triton.scalar_gate.final_blocks import final_blocks_backward
from loglinear.kernels.triton.scalar_gate.state_backward import state_backward
from loglinear.kernels.triton.scalar_gate.states import Reads
from loglinear.kernels.triton.scalar_gate.sweep import down_sweep


def backward(x: Inputs, dblocks: Tensor | None, dq: Tensor, dk: Tensor) -> Tensor | None:
    """Write dq and dk of these groups; return the gradient of their initial blocks."""
    states = build_sums(x)
    read_backward(x, states, dq, x.plan["read_backward"])
    nothing = states.slots.new_zeros(x.layout.chunks, x.halves, x.groups, x.tree.reads, dtype=torch.float32)
    reads = Reads(dlog_walk=nothing, paths=nothing, beyond=nothing)
    dstates = state_backward(x, states, x.q, reads, x.plan["state_backward"])  # a query's value is the query
    if dblocks is not None:
        final_blocks_backward(x, states, (dblocks + dblocks.mT) / 2, dstates)
    down_sweep(x, states, dstates, x.plan["down_sweep"])
    keys_backward(x, dstates.slots, dk, x.plan["keys_backward"])
    return dstates.initial


def gradients(
    dscores: Tensor,
    dblocks: Tensor | None,
    q: Tensor,
    k: Tensor,
    initial: Tensor | None,
    sequences: Sequences,
    first: Tensor | None,
    C: int,
) -> list[Tensor]:
    """Return the gradients of q, k and, if there are any, of the initial blocks, one slab of groups at a time."""
    dq, dk, dscores = like(q), like(k), in_rows(dscores)
    if sequences.cu_seqlens is not None:  # a packed row may end in padding
        dq.zero_()
        dk.zero_()
    dinitial = None if initial is None else like(initial, torch.float32)
    for g in slabs_of(q, k, sequences, C, partial_bytes(q, sequences, C, dscores.shape[3])):
        own = None if initial is None else initial[:, :, g]
        x = inputs_of(q[:, :, g], k[:, :, g], own, dscores[:, :, g], sequences, first, C)
        dinitial_g = backward(x, None if dblocks is None else dblocks[:, :, g], dq[:, :, g], dk[:, :, g])
        if dinitial is not None and dinitial_g is not None:
            dinitial[:, :, g] = dinitial_g
    return [dq, dk] if dinitial is None else [dq, dk, dinitial]
