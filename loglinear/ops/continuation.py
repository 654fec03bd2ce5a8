"""Calls that continue from a state: its buffered tokens in front of the new ones, and the state that a call leaves.

The buffered tokens come first, so chunks start where the unfinished chunk started. impl="reference" does not use this
module. It continues token by token in code of its own, because it checks the other implementations.
"""

# B batch, T time, N sequences, C chunk
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.ops.problem import Problem, WorkingProblem
from loglinear.ops.state import FenwickState
from loglinear.partition import FENWICK


class Places(NamedTuple):
    """The places of the tokens of each sequence in one row of tokens; every field is [N] int64."""

    start: Tensor  # the position of the first new token
    end: Tensor  # the position after the last one
    buffer: Tensor  # the place of the first token of the unfinished chunk
    first: Tensor  # the place of the first new token

    def of(self, position: Tensor, C: int) -> Tensor:
        """Return the place of a position at or after the beginning of the unfinished chunk."""
        return torch.where(position < self.start, self.buffer + position % C, self.first + position - self.start)


def sequence_of(place: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the number of the packed sequence that holds each place, as int64.

    All boundaries are searched: torch.compile of torch 2.11 loses the offset of a slice of them on a GPU.
    """
    return torch.bucketize(place, cu_seqlens.to(place.dtype), right=True) - 1


def sequence_ends(p: Problem | WorkingProblem, N: int) -> Tensor:
    """Return the boundaries of the N sequences in the new tokens [B T], as int64 [N + 1]."""
    if p.cu_seqlens is None:
        return torch.arange(N + 1, device=p.v.device) * p.v.shape[1]
    return p.cu_seqlens.to(p.v.device, torch.int64)


def in_one_row(new: Tensor, state: FenwickState | None, buffer: Tensor | None = None) -> Tensor:
    """Return new tokens [B, T, ...] as one row, after the C buffered tokens of each sequence of a state.

    q and lambda have no buffer. They get zeros, which nothing reads.
    """
    new = new.flatten(0, 1)
    if state is None:
        return new
    buffered = state.k.shape[0] * state.k.shape[1]
    front = new.new_zeros(buffered, *new.shape[1:]) if buffer is None else buffer.flatten(0, 1).to(new.dtype)
    return torch.cat([front, new])


def places_in_one_row(p: Problem | WorkingProblem, N: int) -> Places:
    """Return the places of a call's tokens `in_one_row`."""
    ends = sequence_ends(p, N)
    if p.initial_state is None:
        start = torch.zeros_like(ends[1:])
        return Places(start, ends.diff(), start, ends[:-1])
    start, buffer = p.initial_state.position, torch.arange(N, device=ends.device) * p.chunk_size
    return Places(start, start + ends.diff(), buffer, N * p.chunk_size + ends[:-1])


def take(x: Tensor, place: Tensor, real: Tensor) -> Tensor:
    """Return x[place], with zeros where `real` is False; every place must exist."""
    rows = x.index_select(0, place.flatten()).view(*place.shape, *x.shape[1:])
    return torch.where(real.view(*real.shape, *[1] * (x.dim() - 1)), rows, 0.0)


def final_state(
    p: Problem | WorkingProblem, blocks: Tensor, tokens: list[Tensor | None], places: Places
) -> FenwickState:
    """Return the state after a call, from its block states and its tokens (k, v, log_decay, beta) at their places."""
    C, (start, end, buffer, first) = p.chunk_size, (x[:, None] for x in places)
    position = end // C * C + torch.arange(C, device=end.device)
    real = position < end
    place = torch.where(real, Places(start, end, buffer, first).of(position, C), 0)
    tails = [None if x is None else take(x, place, real).to(blocks.dtype) for x in tokens]
    began = None if p.initial_state is None else p.initial_state.first
    began = torch.zeros_like(places.end) if began is None else began.clone()
    # Copies, because all layers may share the places and the beginnings, and the state is its owner's.
    partition = None if p.partition == FENWICK else p.partition
    return FenwickState._make([places.end.clone(), blocks, *tails, partition, began])
