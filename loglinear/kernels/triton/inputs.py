"""One call on the host: its tensors, and its inputs as the kernels take them."""

# B batch, T time, G groups, H heads, K key, V value, L levels, N sequences, M blocks, C chunk
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import Math, Rows, Sizes
from loglinear.kernels.triton.launches import Plan
from loglinear.kernels.triton.tree import Tree
from loglinear.partition import FENWICK, Partition

# The factors of the products, which are also the dtype of states, and their precision. float16 has the mantissa of tf32
# but not the range that a sum over a long past needs, so its products are single tf32 products of float32 states
# (three where a chunk's error would be carried on: the delta rule's inverse, transition and state).
DOT_TYPES = {
    torch.float32: (torch.float32, Math(tl.float32, "tf32x3")),
    torch.float16: (torch.float32, Math(tl.float32, "tf32")),
    torch.bfloat16: (torch.bfloat16, Math(tl.bfloat16, "tf32")),
}


class Operands(NamedTuple):
    """The tensors of a call: q, k [B,T,G,K], v [B,T,H,V], log_decay, beta [B,T,H], level_scales [B,T,H,L], and the
    blocks of the initial state [N,M,H,K,V]. Without the delta rule there is no beta; log_decay of a diagonal gate is
    [B,T,H,K]."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None
    level_scales: Tensor
    initial: Tensor | None

    @property
    def is_diagonal(self) -> bool:
        return self.log_decay.dim() == 4

    def heads(self, h: slice) -> Operands:
        """Return the operands of some heads, and of the groups that they belong to."""
        if is_whole(h, self.v.shape[2]):
            return self
        R = self.v.shape[2] // self.q.shape[2]
        g = slice(h.start // R, (h.stop - 1) // R + 1)
        beta, initial = (None if x is None else x[:, :, h] for x in (self.beta, self.initial))
        v, log_decay, level_scales = (x[:, :, h] for x in (self.v, self.log_decay, self.level_scales))
        return Operands(self.q[:, :, g], self.k[:, :, g], v, log_decay, beta, level_scales, initial)


class Sequences(NamedTuple):
    """The ends of packed sequences [N + 1], and the number of the chunk with which each begins [N], for a state; does
    each leave its blocks? Then its unfinished chunk has a place even without tokens. And the partition of the past."""

    cu_seqlens: Tensor | None
    starts: Tensor | None
    final: bool = False
    partition: Partition = FENWICK


class Results(NamedTuple):
    """The output [B,T,H,V] of a call, the blocks [N,M,H,K,V] that each sequence leaves, and the arrays that the delta
    rule saves for its backward: each chunk's inverse [chunk,H,C,C] and cumulative log decay [chunk,H,C]."""

    output: Tensor
    blocks: Tensor | None
    inverse: Tensor | None = None
    cumulative: Tensor | None = None

    @classmethod
    def joined(cls, parts: list[Results]) -> Results:
        """One call's results from those of ranges of its heads."""
        if len(parts) == 1:
            return parts[0]
        output, *others = (
            None if x[0] is None else torch.cat(x, axis_of_heads)
            for x, axis_of_heads in zip(zip(*parts, strict=True), (2, 2, 1, 1), strict=True)
        )
        assert output is not None
        return cls(output, *others)


class Outgoing(NamedTuple):
    """The gradients of a call's output and of its blocks, if any; and what its forward saved."""

    do: Tensor
    dblocks: Tensor | None
    inverse: Tensor | None = None
    cumulative: Tensor | None = None

    def heads(self, h: slice) -> Outgoing:
        if is_whole(h, self.do.shape[2]):
            return self
        dblocks = None if self.dblocks is None else self.dblocks[:, :, h]
        inverse, cumulative = (None if x is None else x[:, h] for x in (self.inverse, self.cumulative))
        return Outgoing(self.do[:, :, h], dblocks, inverse, cumulative)


@dataclass(frozen=True)
class Inputs:
    """A call's operands as the kernels take them, with its sizes and the layout of its chunks."""

    q: Rows
    k: Rows
    v: Rows
    log_decay: Rows
    beta: Rows | None
    level_scales: Rows
    initial: Tensor | None
    sizes: Sizes
    scale: float
    plan: Plan
    dtype: torch.dtype  # of the states
    math: Math
    layout: Any

    @classmethod
    def of(cls, x: Operands, layout: Any, scale: float, plan: Plan, products: torch.dtype) -> Any:
        """`products` is one of DOT_TYPES."""
        H, L = x.level_scales.shape[2:]
        sizes = Sizes(x.q.shape[1], layout.chunks_per_row, H, H // x.q.shape[2], L, layout.cap)
        dtype, math = DOT_TYPES[products]
        q, k, v, level_scales = (Rows.of(in_rows(y)) for y in (x.q, x.k, x.v, x.level_scales))
        # The rows of a diagonal gate are as long as those of the keys.
        log_decay = Rows.of(x.log_decay if x.log_decay.dim() == 3 else in_rows(x.log_decay))
        beta = None if x.beta is None else Rows.of(x.beta)
        initial = None if x.initial is None else x.initial.to(dtype).contiguous()
        return cls(q, k, v, log_decay, beta, level_scales, initial, sizes, scale, plan, dtype, math, layout)

    @property
    def chunk_size(self) -> int:
        return self.plan.chunk_size

    @property
    def tree(self) -> Tree:
        return self.layout.tree

    @property
    def heads(self) -> int:
        return self.sizes.H

    @property
    def groups(self) -> int:
        return self.q.data.shape[2]

    @property
    def key_dim(self) -> int:
        return self.q.data.shape[3]

    @property
    def value_dim(self) -> int:
        return self.v.data.shape[3]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.v.data.device)


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of all tensors, or float32."""
    dtypes = {x.dtype for x in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def in_rows(x: Tensor) -> Tensor:
    """x [B, T, heads, D] with rows of neighbouring numbers, and heads within 32 bits of one another; else a copy."""
    is_near = abs(x.stride(2)) * x.shape[2] < 1 << 31
    return x if x.stride(3) == 1 and is_near else x.contiguous()


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of x's shape whose numbers follow one another."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def is_whole(h: slice, heads: int) -> bool:
    """Are these all heads? Then no view is made, of which each takes a host's microsecond."""
    return h.start == 0 and h.stop == heads


def slabs(chunks: int, groups: int, heads: int, state_bytes: int, limit: int) -> list[slice]:
    """Ranges of heads whose states fit `limit` bytes: whole groups, as even as can be, or equal shares of one."""
    R = heads // groups
    fits = max(1, limit // (chunks * state_bytes))
    if fits >= R:
        step = -(-groups // -(-groups // (fits // R))) * R
    else:
        step = max(d for d in range(1, fits + 1) if R % d == 0)
    return [slice(first, min(first + step, heads)) for first in range(0, heads, step)]
