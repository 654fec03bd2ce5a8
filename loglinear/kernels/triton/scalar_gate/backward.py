"""The backward in seven stages: each is the adjoint of a forward's stage, in the opposite order."""

# B batch, T time, H heads, G groups, K key, V value, L levels, N sequences, M blocks
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.kernels.triton.args import Planes, Rows, Slab
from loglinear.kernels.triton.inputs import (
    DOT_TYPES,
    Operands,
    Outgoing,
    Sequences,
    common_dtype,
    in_rows,
    is_whole,
    like,
    slabs,
)
from loglinear.kernels.triton.launches import Plan, ceil_div
from loglinear.kernels.triton.layout import Layout
from loglinear.kernels.triton.scalar_gate.chunk_state_backward import chunk_state_backward
from loglinear.kernels.triton.scalar_gate.decay_backward import decay_backward
from loglinear.kernels.triton.scalar_gate.final_blocks import final_blocks_backward
from loglinear.kernels.triton.scalar_gate.forward import build_states, inputs_of
from loglinear.kernels.triton.scalar_gate.in_chunk_backward import in_chunk_backward
from loglinear.kernels.triton.scalar_gate.state_backward import state_backward
from loglinear.kernels.triton.scalar_gate.states import Inputs
from loglinear.kernels.triton.scalar_gate.sweep import down_sweep
from loglinear.kernels.triton.scalar_gate.walk_backward import walk_backward
from loglinear.kernels.triton.tree import Tree

SLAB_BYTES = 1 << 30  # of the states that a backward builds at once; their gradients take as much again


class Slabs(NamedTuple):
    """The gradients that the stages write where they belong: views of some heads of dv, dlog_decay, dlevel_scales."""

    dv: Tensor
    dlog_decay: Tensor
    dlevel_scales: Tensor

    def heads(self, h: slice) -> Slabs:
        return self if is_whole(h, self.dv.shape[2]) else Slabs(*(x[:, :, h] for x in self))


def backward(x: Inputs, outgoing: Outgoing, slabs: Slabs, *, partial: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Write the gradients of these heads into `slabs`; return dq, dk and dinitial.

    With `partial` these are not all heads of their group: dq and dk are to be added up, in float32.
    """
    do, dv, dlog_decay, dlevel_scales = Rows.of(outgoing.do), *map(Slab.of, slabs)
    # One program sums all heads of a group, or dq and dk have a plane for each share of them.
    are_whole = not partial and x.splits == 1
    dq, dk = (
        Planes.of(x.empty(x.splits, *y.data.shape, dtype=y.data.dtype if are_whole else torch.float32))
        for y in (x.q, x.k)
    )
    states = build_states(x)
    assert states.cumulative is not None
    inside = in_chunk_backward(x, states.cumulative, do, dv, dlevel_scales, x.plan["in_chunk_backward"])
    reads = walk_backward(x, states, do, inside, dq, dlevel_scales, x.plan["walk_backward"])
    dstates = state_backward(x, states, do, reads, x.plan["state_backward"])  # each slot gathers from its readers
    if outgoing.dblocks is not None:
        final_blocks_backward(x, states, outgoing.dblocks, dstates)
    dtotals = down_sweep(x, states, dstates, x.plan["down_sweep"])
    dlog_state = chunk_state_backward(x, states, dstates, inside, dk, dv, x.plan["chunk_state_backward"])
    decay_backward(x, inside, reads, dlog_state, dtotals, dlog_decay)
    dq_sum, dk_sum = (y.data[0] if x.splits == 1 else y.data.sum(0) for y in (dq, dk))
    return dq_sum, dk_sum, dstates.initial


class Family(NamedTuple):
    """A family's functions for the gradients of one slab of heads."""

    inputs_of: Callable[[Operands, Sequences, float, Plan], Any]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    more_bytes: Callable[[Operands, Layout], int] | None = None  # of a chunk and head, in addition to its state


def gradients(x: Operands, sequences: Sequences, outgoing: Outgoing, scale: float, plan: Plan) -> Operands:
    """The gradient of every operand: slab after slab of heads, so that states and their gradients stay small."""
    return gradients_by_slabs(x, sequences, outgoing, scale, plan, Family(inputs_of, backward))


def gradients_by_slabs(
    x: Operands, sequences: Sequences, outgoing: Outgoing, scale: float, plan: Plan, family: Family
) -> Operands:
    """`gradients` of a family."""
    rows, tokens, G, K = x.q.shape
    H, V = x.v.shape[2:]
    R, C = H // G, plan.chunk_size
    chunks = rows * ceil_div(tokens, C) + (0 if sequences.cu_seqlens is None else len(sequences.cu_seqlens))
    state_bytes = K * V * DOT_TYPES[common_dtype(x.q, x.k, x.v)][0].itemsize
    outgoing = outgoing._replace(do=in_rows(outgoing.do))

    # Columns that no walk reads stay 0.
    dlevel_scales, tree = like(x.level_scales), Tree.of(sequences.partition, C)
    if x.level_scales.shape[3] > tree.column + tree.reads or tree.radix_log > 1 or family.more_bytes is not None:
        dlevel_scales.zero_()
    views = Slabs(like(x.v), like(x.log_decay), dlevel_scales)
    dinitial = None if x.initial is None else like(x.initial, torch.float32)
    y = family.inputs_of(x, sequences, scale, plan).layout if tree.radix_log > 1 or family.more_bytes else None
    if family.more_bytes is not None and y is not None:
        state_bytes += family.more_bytes(x, y)
    if tree.radix_log > 1 and y is not None:  # a run has a sum for each of up to r - 1 blocks a digit
        state_bytes += -(-y.runs[0] * max(1, y.run_reads) * K * V * torch.float32.itemsize // chunks)
    parts = slabs(chunks, G, H, state_bytes, SLAB_BYTES)
    partial = parts[0].stop - parts[0].start < R
    if len(parts) > 1:
        dq, dk = (like(y, torch.float32 if partial else None) for y in (x.q, x.k))
    for h in parts:
        g = slice(h.start // R, (h.stop - 1) // R + 1)
        call = family.inputs_of(x.heads(h), sequences, scale, plan)
        dq_h, dk_h, dinitial_h = family.backward(call, outgoing.heads(h), views.heads(h), partial=partial)
        if len(parts) == 1:
            dq, dk = dq_h, dk_h
        elif h.start % R == 0:
            dq[:, :, g], dk[:, :, g] = dq_h, dk_h
        else:
            dq[:, :, g] += dq_h
            dk[:, :, g] += dk_h
        if dinitial is not None and dinitial_h is not None:
            dinitial[:, :, h] = dinitial_h
    return Operands(dq.to(x.q.dtype), dk.to(x.k.dtype), views.dv, views.dlog_decay, None, dlevel_scales, dinitial)
