"""The scores of buckets by impl="triton": the kernels read raw q and k, or of length 1 in a call that continues.

The kernels' sums M_b lack their mean for random keys, n_b / K I. It is subtracted from the initial blocks and added to
the final ones.
"""

# B batch, T time, G groups, K key, L columns, N sequences, M blocks, C chunk
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loglinear.kernels.torch import block_tokens
from loglinear.kernels.unchanging import once
from loglinear.ops import impl_triton
from loglinear.ops.continuation import final_state, in_one_row, places_in_one_row
from loglinear.ops.problem import Problem, unit_length
from loglinear.ops.state import FenwickState

CHUNK_SIZE = 64  # where no state prescribes it, the size of a block near it


def prepared(p: Problem) -> Problem:
    """Return the call as the kernels take it: with a state q and k have length 1, in float32 as the state's keys."""
    if p.initial_state is not None:
        q, k = unit_length(p.q.to(p.initial_state.k.dtype)), unit_length(p.k.to(p.initial_state.k.dtype))
        return replace(p, q=q, k=k, v=k)
    return p if p.output_final_state else replace(p, chunk_size=CHUNK_SIZE)


def unsupported(p: Problem) -> str | None:
    """Return the reason why the kernels do not support a `prepared` call; None if they support it."""
    return impl_triton.unsupported(p)


def run(p: Problem, num_columns: int) -> tuple[Tensor, FenwickState | None]:
    """Return the scores [B, T, G, L] of a `prepared` call, and the final state if the call asks for it."""
    reason = unsupported(p)
    if reason is not None:
        raise ValueError(reason)
    from loglinear.kernels.triton import bucket_scores

    p = impl_triton.with_boundaries(p)
    state, options = p.initial_state, (p.output_final_state, p.partition.numbers)
    if state is None:
        new = p.q, p.k, None, p.cu_seqlens, None, None
        scores, blocks = bucket_scores(*new, num_columns, impl_triton.block_size(p), *options)
        k, places = in_one_row(p.k, None), places_in_one_row(p, p.num_sequences)
    else:
        row, C = impl_triton.Continued.of(p, state), p.chunk_size
        k = row.packed(p.k, state.k)
        packed = row.packed(p.q)[None], k[None], _initial(p, state, row.starts), row.ends, row.starts, state.first
        scores, blocks = bucket_scores(*packed, num_columns, C, *options)
        scores, places = row.unpacked(scores).view(*p.q.shape[:3], num_columns), row.places
    if not p.output_final_state:
        return scores, None
    blocks = blocks + _means(places.end // p.chunk_size, blocks, p)
    no_decay = k.new_zeros(k.shape[:2])
    final = final_state(p, blocks, [k, k, no_decay, None], places)
    if state is None:
        unit = unit_length(final.k)
        # A state made by `_replace` came out of a graph of torch 2.11 without its last fields.
        final = FenwickState(final.position, final.blocks, unit, unit, final.log_decay, None, *final[6:])
    return scores, final


def _initial(p: Problem, state: FenwickState, starts: Tensor) -> Tensor:
    """Return the initial blocks as the kernels take them. An empty state has the same in all layers."""

    def make() -> Tensor:
        symmetric = (state.blocks + state.blocks.mT) / 2
        return symmetric - _means(starts, symmetric, p)

    return once(make, ("initial sums", p.chunk_size, p.partition), state.blocks, starts, state.first)


def _means(chunks: Tensor, blocks: Tensor, p: Problem) -> Tensor:
    """Return n_b / K I for the blocks [N, M, G, K, K] before these chunks [N]."""
    M, K = blocks.shape[1], blocks.shape[4]
    first = None if p.initial_state is None else p.initial_state.first
    tokens = block_tokens(chunks, M, p.chunk_size, p.partition, first).to(blocks.dtype)
    return (tokens / K)[:, :, None, None, None] * torch.eye(K, dtype=blocks.dtype, device=blocks.device)
