"""The forward in the four steps of `reference/chunked.py`, behind the decays inside the chunks.

It keeps nothing but its inputs, as the scalar gate's (docs/lab-notes/2026-11-30-diagonal-kernels.md).
"""

from __future__ import annotations

from typing import NamedTuple

from loglinear.kernels.triton.diagonal_gate.decayed_rows import decayed_rows, room
from loglinear.kernels.triton.diagonal_gate.output import output
from loglinear.kernels.triton.diagonal_gate.states import Decayed, Inputs
from loglinear.kernels.triton.inputs import DOT_TYPES, Operands, Results, Sequences, common_dtype, slabs
from loglinear.kernels.triton.launches import Kind, Plan, ceil_div, choose
from loglinear.kernels.triton.layout import layout
from loglinear.kernels.triton.scalar_gate.chunk_state import own_states
from loglinear.kernels.triton.scalar_gate.final_blocks import final_blocks
from loglinear.kernels.triton.scalar_gate.states import States
from loglinear.kernels.triton.scalar_gate.sweep import up_sweep

SLAB_BYTES = 4 << 30  # of the decayed rows, their scores and the states that a forward has at once


class Built(NamedTuple):
    """The decayed rows of a call, the call of the later stages, and its Fenwick array."""

    decayed: Decayed
    x: Inputs
    states: States


def plan_of(direction: str, x: Operands, chunk_size: int | None) -> Plan:
    """The plan of a call; a state prescribes its chunk size."""
    kind = Kind("diagonal_gate", direction, x.q.shape[3], x.v.shape[3], common_dtype(x.q, x.k, x.v))
    return choose(kind, x.q.shape[1], x.v.device, chunk_size)


def row_bytes(x: Operands, chunk_size: int) -> int:
    """Return the bytes of a chunk's decayed rows and scores of one head."""
    itemsize = DOT_TYPES[common_dtype(x.q, x.k, x.v)][0].itemsize
    return chunk_size * (2 * x.q.shape[3] * itemsize + 4 * chunk_size)


def forward_slabs(x: Operands, sequences: Sequences, plan: Plan) -> list[slice]:
    """Ranges of heads, so that the decayed rows of long sequences stay small."""
    (rows, tokens, G, K), (H, V), C = x.q.shape, x.v.shape[2:], plan.chunk_size
    chunks = rows * ceil_div(tokens, C) + (0 if sequences.cu_seqlens is None else len(sequences.cu_seqlens))
    state_bytes = K * V * DOT_TYPES[common_dtype(x.q, x.k, x.v)][0].itemsize
    return slabs(chunks, G, H, state_bytes + row_bytes(x, C), SLAB_BYTES)


def inputs_of(x: Operands, sequences: Sequences, scale: float, plan: Plan) -> Inputs:
    cu_seqlens, starts, _, partition = sequences
    y = layout(*x.q.shape[:2], plan.chunk_size, x.level_scales.shape[3], cu_seqlens, starts, partition)
    return Inputs.of(x, y, scale, plan, common_dtype(x.q, x.k, x.v))


def build_states(x: Inputs) -> Built:
    y = x.layout
    decayed = room(x, x.empty(len(y.runs) + 1, y.chunks, x.heads, x.key_dim), delta=False)
    decayed = decayed_rows(x, decayed, 1.0, x.math, x.plan["decayed_rows"])  # 0. the decays inside the chunks
    of_heads = x.of_heads(decayed)
    states = own_states(of_heads, decayed.totals, None, x.plan["chunk_state"])  # 1. each chunk's own state
    return Built(decayed, of_heads, up_sweep(of_heads, states, x.plan["up_sweep"]))  # 2. merged, in place


def forward(x: Inputs, *, final: bool) -> Results:
    """The output [B,T,H,V]; with `final` also the blocks [N,M,H,K,V] that each sequence leaves."""
    decayed, x, states = build_states(x)
    out = output(x, decayed.scores, states, x.plan["output"])  # 3. inside the chunk, and 4. the walk over its past
    return Results(out, final_blocks(x, states) if final else None)
