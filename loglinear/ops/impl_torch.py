"""The implementation impl="torch": the Fenwick-array algorithm in plain torch, on any device.

The buffered tokens of a state come before the new ones, so chunks start where the unfinished chunk started. The
outputs of the buffered tokens are dropped. Autograd differentiates this without a separate formula for states.
"""

# N sequences, T time, C chunk, M blocks, H heads, G groups, K key, V value, L levels
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels import torch as kernels
from loglinear.ops.problem import Problem, WorkingProblem, is_transformed
from loglinear.ops.state import FenwickState
from loglinear.partition import FENWICK


def run(problem: Problem) -> tuple[Tensor, FenwickState | None]:
    """Return the output and, if the call asks for it, the final state."""
    p = problem.in_working_dtype()
    state, N, C = p.initial_state, problem.num_sequences, p.chunk_size
    q, scales = (in_one_row(x, state) for x in (p.q, p.level_scales))
    k, v = in_one_row(p.k, state, state and state.k), in_one_row(p.v, state, state and state.v)
    log_decay = in_one_row(p.log_decay, state, state and state.log_decay)
    beta = None if p.beta is None else in_one_row(p.beta, state, state and state.beta)
    position, nodes = (None, None) if state is None else (state.position, state.blocks.to(v.dtype))
    compute = kernels.stages if records_stages() else kernels.fenwick_array
    output, blocks = compute(
        q, k, v, log_decay, beta, scales, nodes, position, p.cu_seqlens, N, C, p.output_final_state,
        p.partition.numbers,
    )  # fmt: skip
    output = output[0 if state is None else N * C :].view(p.v.shape)
    return output, final_state(p, blocks, [k, v, log_decay, beta], N) if p.output_final_state else None


def in_one_row(new: Tensor, state: FenwickState | None, buffer: Tensor | None = None) -> Tensor:
    """Return new tokens [B, T, ...] as one row, after the C buffered ones of each sequence of a state.

    q and lambda have no buffer and get unread zeros.
    """
    new = new.flatten(0, 1)
    if state is None:
        return new
    held = state.k.shape[0] * state.k.shape[1]
    front = new.new_zeros(held, *new.shape[1:]) if buffer is None else buffer.flatten(0, 1).to(new.dtype)
    return torch.cat([front, new])


def records_stages() -> bool:
    """Return True if a transform must see every stage of an operator, because it knows no registered operators."""
    transformed = is_transformed()
    if transformed and torch.compiler.is_compiling():
        raise ValueError("torch.func and forward-mode derivatives of an operator do not work in torch.compile")
    return transformed


def final_state(p: WorkingProblem, blocks: Tensor, tokens: list[Tensor | None], N: int) -> FenwickState:
    """Return the state after a call from its block states and its tokens `in_one_row`: k, v, log_decay and beta."""
    device = p.v.device
    if p.cu_seqlens is None:
        ends = torch.arange(N + 1, device=device) * p.v.shape[1]
    else:
        ends = p.cu_seqlens.to(device, torch.int64)
    held = 0 if p.initial_state is None else N * p.chunk_size
    start = torch.zeros_like(ends[1:]) if p.initial_state is None else p.initial_state.position
    end = start + ends.diff()
    tails = _tails(tokens, start, end, held + ends[:-1], p.chunk_size)
    return FenwickState._make([end, blocks, *tails, None if p.partition == FENWICK else p.partition])


def _tails(tokens: list[Tensor | None], start: Tensor, end: Tensor, first: Tensor, C: int) -> list[Tensor | None]:
    """Return the unfinished chunk's tokens [N, C, ...] of sequences that went from position `start` to `end`.

    New tokens begin at row `first`. Older tokens of the same chunk are in its sequence's buffer.
    """
    at = (end // C * C)[:, None] + torch.arange(C, device=end.device)
    buffered = torch.arange(len(end), device=end.device)[:, None] * C + at % C
    row = torch.where(at < start[:, None], buffered, first[:, None] + at - start[:, None])
    real = at < end[:, None]
    row = torch.where(real, row, 0).flatten()

    def tail(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        rows = x.index_select(0, row).view(*real.shape, *x.shape[1:])
        return torch.where(real.view(*real.shape, *[1] * (x.dim() - 1)), rows, 0.0)

    return [tail(x) for x in tokens]
