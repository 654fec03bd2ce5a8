"""The implementation impl="torch": the Fenwick-array algorithm in plain torch, on any device.

A state's buffered tokens come first in one row with the new ones (`continuation`), and their outputs are dropped.
Autograd differentiates this without a separate formula for states.
"""

# N sequences, T time, C chunk, M blocks, H heads, G groups, K key, V value, L levels
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels import torch as kernels
from loglinear.ops.continuation import final_state, in_one_row, places_in_one_row
from loglinear.ops.problem import Problem, is_transformed
from loglinear.ops.state import FenwickState


def run(problem: Problem) -> tuple[Tensor, FenwickState | None]:
    """Return the output and, if the call asks for it, the final state."""
    p = problem.in_working_dtype()
    state, N, C = p.initial_state, problem.num_sequences, p.chunk_size
    q, scales = (in_one_row(x, state) for x in (p.q, p.level_scales))
    k, v = in_one_row(p.k, state, state and state.k), in_one_row(p.v, state, state and state.v)
    log_decay = in_one_row(p.log_decay, state, state and state.log_decay)
    beta = None if p.beta is None else in_one_row(p.beta, state, state and state.beta)
    position, initial = (None, None) if state is None else (state.position, state.blocks.to(v.dtype))
    compute = kernels.stages if records_stages() else kernels.fenwick_array
    output, blocks = compute(
        q,
        k,
        v,
        log_decay,
        beta,
        scales,
        initial,
        position,
        p.cu_seqlens,
        N,
        C,
        p.output_final_state,
        p.partition.numbers,
    )
    output = output[0 if state is None else N * C :].view(p.v.shape)
    if not p.output_final_state:
        return output, None
    return output, final_state(p, blocks, [k, v, log_decay, beta], places_in_one_row(p, N))


def records_stages() -> bool:
    """Return True if a transform must see every stage of an operator, because it knows no registered operators."""
    transformed = is_transformed()
    if transformed and torch.compiler.is_compiling():
        raise ValueError("torch.func and forward-mode derivatives of an operator do not work in torch.compile")
    return transformed
