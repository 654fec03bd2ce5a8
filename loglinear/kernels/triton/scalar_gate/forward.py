"""The forward in the four steps of `reference/chunked.py`. One kernel takes the last two.

It keeps nothing but its inputs: the backward builds the states again, which is cheaper than holding T / C of them
(docs/lab-notes/2026-11-23-scalar-gate-kernels.md).
"""

from __future__ import annotations

from loglinear.kernels.triton.inputs import Operands, Results, Sequences, common_dtype
from loglinear.kernels.triton.launches import Kind, Plan, choose
from loglinear.kernels.triton.layout import layout
from loglinear.kernels.triton.scalar_gate.chunk_state import chunk_state
from loglinear.kernels.triton.scalar_gate.final_blocks import final_blocks
from loglinear.kernels.triton.scalar_gate.output import output
from loglinear.kernels.triton.scalar_gate.states import Inputs, States
from loglinear.kernels.triton.scalar_gate.sweep import up_sweep


def plan_of(direction: str, x: Operands, chunk_size: int | None) -> Plan:
    """The plan of a call; a state prescribes its chunk size."""
    kind = Kind("scalar_gate", direction, x.q.shape[3], x.v.shape[3], common_dtype(x.q, x.k, x.v))
    return choose(kind, x.q.shape[1], x.v.device, chunk_size)


def forward_slabs(x: Operands, sequences: Sequences, plan: Plan) -> list[slice]:
    """All heads at once: a chunk has one state."""
    return [slice(0, x.v.shape[2])]


def inputs_of(x: Operands, sequences: Sequences, scale: float, plan: Plan) -> Inputs:
    cu_seqlens, starts, _, partition = sequences
    y = layout(*x.q.shape[:2], plan.chunk_size, x.level_scales.shape[3], cu_seqlens, starts, partition)
    return Inputs.of(x, y, scale, plan, common_dtype(x.q, x.k, x.v))


def build_states(x: Inputs) -> States:
    states = chunk_state(x, x.plan["chunk_state"])  # 1. each chunk's own state
    return up_sweep(x, states, x.plan["up_sweep"])  # 2. merged, in place, into the Fenwick array


def forward(x: Inputs, *, final: bool) -> Results:
    """The output [B,T,H,V]; with `final` also the blocks [N,M,H,K,V] that each sequence leaves."""
    states = build_states(x)
    out = output(x, states, x.plan["output"])  # 3. inside the chunk, and 4. the walk over its past
    return Results(out, final_blocks(x, states) if final else None)
