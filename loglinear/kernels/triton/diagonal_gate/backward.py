"""The backward: each stage is the adjoint of a forward's stage, in the opposite order."""

# B batch, T time, H heads, G groups, K key
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.triton.args import Rows, Slab
from loglinear.kernels.triton.diagonal_gate.decayed_rows_backward import Rowwise, decayed_rows_backward
from loglinear.kernels.triton.diagonal_gate.forward import build_states, inputs_of, row_bytes
from loglinear.kernels.triton.diagonal_gate.scores_backward import scores_backward
from loglinear.kernels.triton.diagonal_gate.states import DecayedGradients, Inputs
from loglinear.kernels.triton.diagonal_gate.walk_backward import walk_backward
from loglinear.kernels.triton.diagonal_gate.writes_backward import writes_backward
from loglinear.kernels.triton.inputs import Operands, Outgoing, Sequences
from loglinear.kernels.triton.launches import Plan
from loglinear.kernels.triton.layout import Layout
from loglinear.kernels.triton.scalar_gate.backward import Family, Slabs, gradients_by_slabs
from loglinear.kernels.triton.scalar_gate.final_blocks import final_blocks_backward
from loglinear.kernels.triton.scalar_gate.state_backward import state_backward
from loglinear.kernels.triton.scalar_gate.sweep import down_sweep


def backward(call: Inputs, outgoing: Outgoing, slabs: Slabs, *, partial: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Write the gradients of these heads into `slabs`; return dq, dk and dinitial.

    With `partial` these are not all heads of their group: dq and dk are to be added up, in float32.
    """
    do, dv, dlog_decay, dlevel_scales = Rows.of(outgoing.do), *map(Slab.of, slabs)
    decayed, x, states = build_states(call)
    dq_decayed, dk_decayed = (x.empty(x.layout.chunks, x.heads, x.chunk_size, x.key_dim) for _ in range(2))
    dscores = scores_backward(x, decayed.scores, do, dv, dlevel_scales, x.plan["scores_backward"])
    gradients = DecayedGradients(dq_decayed, dk_decayed, dscores)
    flows = walk_backward(x, states, do, gradients.q, dlevel_scales, x.plan["walk_backward"])
    dstates = state_backward(x, states, do, flows, x.plan["state_backward"])  # each slot gathers from its readers
    if outgoing.dblocks is not None:
        final_blocks_backward(x, states, outgoing.dblocks, dstates)
    dtotals = down_sweep(x, states, dstates, x.plan["down_sweep"])
    writes_backward(x, dstates.slots, gradients.k, dv, x.plan["writes_backward"])
    (B, T, G, K), R = call.q.data.shape, call.sizes.R
    is_whole = not partial and R == 1
    dq, dk = (x.empty(B, T, x.heads, K, dtype=y.data.dtype if is_whole else torch.float32) for y in (call.q, call.k))
    to, gradients = Rowwise(Slab.of(dq), Slab.of(dk), dlog_decay), gradients._replace(totals=dtotals)
    decayed_rows_backward(call, gradients, to, 1.0, x.math, x.plan["decayed_rows_backward"])
    if R == 1:
        return dq, dk, dstates.initial
    return *(y.unflatten(2, (G, R)).sum(3) for y in (dq, dk)), dstates.initial


def more_bytes(x: Operands, y: Layout) -> int:
    """Return the bytes of a chunk's decayed rows and scores of one head, their gradients, and the flows."""
    K = x.q.shape[3]
    return row_bytes(x, y.chunk_size) + 4 * (y.chunk_size * (2 * K + y.chunk_size) + y.reads * K)


def gradients(x: Operands, sequences: Sequences, outgoing: Outgoing, scale: float, plan: Plan) -> Operands:
    """The gradient of every operand, slab after slab of heads."""
    return gradients_by_slabs(x, sequences, outgoing, scale, plan, Family(inputs_of, backward, more_bytes))
