"""The implementation impl="reference": the recurrence, one sequence and one token at a time."""

# N sequences, T time, C chunk, M blocks, H heads, K key, V value, L levels
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loglinear.ops.problem import Problem
from loglinear.ops.state import DecodeState, FenwickState
from loglinear.partition import FENWICK
from loglinear.reference import recurrent, states_from_blocks


def run(problem: Problem) -> tuple[Tensor, FenwickState | None]:
    """Return the output and, if the call asks for it, the final state."""
    p = problem.in_working_dtype()
    state, (B, T) = p.initial_state, p.v.shape[:2]
    if torch.compiler.is_compiling() and not (state is None and p.cu_seqlens is None):
        raise ValueError("impl='reference' reads positions and lengths, which a graph cannot do: use impl='torch'")
    lengths = [T] * B if p.cu_seqlens is None else p.cu_seqlens.diff().tolist()
    positions = [0] * len(lengths) if state is None else state.position.tolist()
    if state is None:
        groups, key_dim = p.q.shape[2:]
        heads, value_dim = p.v.shape[2:]
        state = FenwickState.zeros(
            len(lengths),
            num_levels=p.level_scales.shape[3],
            chunk_size=p.chunk_size,
            groups=groups,
            heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            delta_rule=p.beta is not None,
            diagonal_gate=p.log_decay.dim() == 4,
            dtype=p.v.dtype,
            device=p.v.device,
            partition=p.partition,
        )
    tokens = [None if x is None else x.flatten(0, 1) for x in (p.q, p.k, p.v, p.log_decay, p.beta, p.level_scales)]
    splits = [[None] * len(lengths) if x is None else x.split(lengths) for x in tokens]
    rows = enumerate(zip(*splits, strict=True))
    results = [_run_sequence(state, row, positions[row], parts) for row, parts in rows]
    output = torch.cat([output for output, _ in results]).view(p.v.shape)
    if not p.output_final_state:
        return output, None
    finals = zip(*(final.tensors for _, final in results), strict=True)
    return output, state.with_tensors(torch.stack(parts) for parts in finals)


def step(problem: Problem, state: DecodeState, active: Tensor | None) -> Tensor:
    """Return the output [N, H, V] of one token per row, and advance `state`, the problem's start, in place."""
    output, final = run(problem)
    assert final is not None
    y = output[:, 0].to(problem.v.dtype)
    if active is not None:
        row = active.view(-1, 1, 1)
        y = torch.where(row, y, 0.0)
        final = final.with_tensors(
            torch.where(row.view(-1, *[1] * (new.dim() - 1)), new, old)
            for new, old in zip(final.tensors, state.fenwick.tensors, strict=True)
        )
    state.copy_(final)
    return y


def _run_sequence(state: FenwickState, row: int, position: int, tokens: tuple[Any, ...]) -> tuple[Tensor, FenwickState]:
    """Replay the state's unfinished chunk, run the new tokens and cut the state at the last chunk's start."""
    q, k, v, log_decay, beta, scales = tokens
    C, L, partition = state.chunk_size, scales.shape[2], state.partition or FENWICK
    num_buffered = position % C
    start, end = position - num_buffered, position + len(q)

    def joined(buffer: Tensor | None, new: Tensor | None) -> Tensor | None:
        return None if buffer is None or new is None else torch.cat([buffer[row, :num_buffered].to(new.dtype), new])

    buffered = [joined(old, new) for old, new in zip(state[2:6], (k, v, log_decay, beta), strict=True)]
    own = state.with_tensors(part[row] for part in state.tensors)
    raw = FenwickState._make([own.position + len(q), own.blocks, *buffered, own.partition, own.first])
    R = v.shape[1] // k.shape[1]
    all_k = raw.k.repeat_interleave(R, 1)
    all_q = torch.cat([torch.zeros_like(all_k[:num_buffered]), q.repeat_interleave(R, 1)])
    all_scales = torch.cat([scales.new_zeros(num_buffered, *scales.shape[1:]), scales])
    cut = end // C * C - start  # tokens before the last chunk's start

    def piece(states: Tensor, first: int, last: int, at: int) -> tuple[Tensor, Tensor]:
        part = slice(first, last)
        beta_part = None if raw.beta is None else raw.beta[part]
        return recurrent(
            all_q[part],
            all_k[part],
            raw.v[part],
            raw.log_decay[part],
            beta_part,
            all_scales[part],
            states,
            at,
            partition,
        )

    M = state.blocks.shape[1]
    held_blocks = torch.tensor([partition.has_block(start // C, m, M, C) for m in range(M)], device=v.device)
    blocks = torch.where(held_blocks.view(-1, 1, 1, 1), own.blocks.to(v.dtype), 0.0)
    states = states_from_blocks(blocks, L, C, partition)
    head, states = piece(states, 0, cut, start)
    tail, _ = piece(states, cut, len(all_q), start + cut)
    blocks = torch.stack([states[partition.block_column(m, L, C)] for m in range(M)])

    def buffer(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        rest = x[cut:]
        return torch.cat([rest, rest.new_zeros(C - len(rest), *rest.shape[1:])])

    final = FenwickState._make([raw.position, blocks, *(buffer(x) for x in raw[2:6]), own.partition, own.first])
    return torch.cat([head, tail])[num_buffered:], final
