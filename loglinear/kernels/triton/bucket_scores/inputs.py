"""A call of the scores as its stages take it."""

# B batch, T time, G groups, K key, L columns, N sequences, M blocks, C chunk
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from loglinear.kernels.triton.args import Rows, Sizes
from loglinear.kernels.triton.inputs import DOT_TYPES, Sequences, common_dtype, in_rows, slabs
from loglinear.kernels.triton.launches import Kind, Launch, Plan, ceil_div, default_plan
from loglinear.kernels.triton.layout import layout
from loglinear.kernels.triton.scalar_gate import states

SLAB_BYTES = 1 << 30  # of the sums that a call builds at once; a backward's gradients take as much again


@dataclass(frozen=True)
class Inputs(states.Inputs):
    """A call of the scalar gate whose values are the keys, without decay; its lambda is the gradient of the scores."""

    is_unit: bool
    """Have q and k length 1 already?"""
    first: Tensor | None
    """[N], the position of each packed sequence's first token; None: 0."""

    def row_constants(self, launch: Launch) -> dict[str, Any]:
        """`constants` of the stages in this folder: values are as wide as keys."""
        constants = {name: value for name, value in self.constants(launch).items() if name != "V"}
        return constants | dict(UNIT=self.is_unit)


def inputs_of(
    q: Tensor,
    k: Tensor,
    initial: Tensor | None,
    weights: Tensor,
    sequences: Sequences,
    first: Tensor | None,
    chunk_size: int,
) -> Inputs:
    """Return the call as its stages take it. q, k [B,T,G,K]; weights [B,T,G,L]; initial [N,M,G,K,K].

    Sequences that continue have unit q and k.
    """
    cu_seqlens, starts, _, partition = sequences
    B, T, G, K = q.shape
    y = layout(B, T, chunk_size, weights.shape[3], cu_seqlens, starts, partition)
    products = common_dtype(q, k)
    dtype, math = DOT_TYPES[products]
    keys = Rows.of(in_rows(k))
    return Inputs(
        q=Rows.of(in_rows(q)),
        k=keys,
        v=keys,
        log_decay=Rows.of(weights),  # no stage of the scores reads it
        beta=None,
        level_scales=Rows.of(weights),
        initial=None if initial is None else initial.to(dtype).contiguous(),
        sizes=Sizes(T, y.chunks_per_row, G, 1, weights.shape[3], y.cap),
        scale=1.0,
        plan=plan_of(K, products, chunk_size),
        dtype=dtype,
        math=math,
        layout=y,
        is_unit=starts is not None,
        first=first,
    )


@lru_cache
def plan_of(K: int, products: torch.dtype, chunk_size: int) -> Plan:
    """The launches of all stages; those that the scalar gate shares are its defaults."""
    shared = default_plan(Kind("scalar_gate", "backward", K, K, products), chunk_size).stages
    own = dict.fromkeys(("read", "read_backward", "keys_backward"), shared["state_backward"]._replace(num_warps=8))
    if products == torch.bfloat16 and K <= 128:  # all columns are one tile
        own = dict(
            read=Launch(128, num_stages=2),
            read_backward=Launch(128, num_warps=8, num_stages=2),
            keys_backward=Launch(128, num_warps=8),
        )
    return Plan(chunk_size, shared | own | dict(chunk_sums=shared["chunk_state"]))


def slabs_of(q: Tensor, k: Tensor, sequences: Sequences, chunk_size: int, more_bytes: int = 0) -> list[slice]:
    """Return ranges of groups whose sums fit the memory. more_bytes: of a chunk and group, in addition to its sum."""
    chunks = chunks_of(q, sequences, chunk_size)
    sum_bytes = q.shape[3] ** 2 * DOT_TYPES[common_dtype(q, k)][0].itemsize
    return slabs(chunks, q.shape[2], q.shape[2], sum_bytes + more_bytes, SLAB_BYTES)


def chunks_of(q: Tensor, sequences: Sequences, chunk_size: int) -> int:
    """Return an upper bound of the number of the sequences' chunks."""
    ends = sequences.cu_seqlens
    return q.shape[0] * ceil_div(q.shape[1], chunk_size) + (0 if ends is None else len(ends))


def partial_bytes(q: Tensor, sequences: Sequences, chunk_size: int, num_columns: int) -> int:
    """Return a chunk's share of the sums that a backward gathers for each run of chunks and block of a large digit."""
    cu_seqlens, starts, _, partition = sequences
    if partition.radix == 2:
        return 0
    y = layout(*q.shape[:2], chunk_size, num_columns, cu_seqlens, starts, partition)
    sums = y.runs[0] * max(1, y.run_reads) * q.shape[3] ** 2
    return ceil_div(sums * torch.float32.itemsize, chunks_of(q, sequences, chunk_size))
