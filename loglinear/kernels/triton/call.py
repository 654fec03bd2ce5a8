"""What both operators' calls have in common on the host: dtypes, strides, and slabs of heads for the backward."""

# B batch, T time, G groups, H heads, K key, V value, L levels
from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

# What the matrix units multiply, what states are kept in, and how. float16 has the mantissa of tf32 but not the range
# that a sum over a long past needs, so its products are single tf32 products of float32 states
# (three where a chunk's error would be carried on: the delta rule's inverse, transition and state).
DOT_TYPES = {
    torch.float32: (torch.float32, tl.float32, "tf32x3"),
    torch.float16: (torch.float32, tl.float32, "tf32"),
    torch.bfloat16: (torch.bfloat16, tl.bfloat16, "tf32"),
}


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of all tensors, or float32."""
    dtypes = {x.dtype for x in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def in_rows(x: Tensor) -> Tensor:
    """x [B, T, heads, D] with rows of neighbouring numbers, and heads within 32 bits of one another; else a copy."""
    is_near = abs(x.stride(2)) * x.shape[2] < 1 << 31
    return x if x.stride(3) == 1 and is_near else x.contiguous()


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of x's shape whose numbers follow one another."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def slabs(chunks: int, groups: int, heads: int, state_bytes: int, limit: int) -> list[slice]:
    """Ranges of heads whose states fit `limit` bytes: whole groups, as even as can be, or equal shares of one."""
    R = heads // groups
    fits = max(1, limit // (chunks * state_bytes))
    if fits >= R:
        step = -(-groups // -(-groups // (fits // R))) * R
    else:
        step = max(d for d in range(1, fits + 1) if R % d == 0)
    return [slice(first, min(first + step, heads)) for first in range(0, heads, step)]


class Call:
    """One call: its inputs and sizes. products: which of DOT_TYPES."""

    def __init__(
        self,
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_scales: Tensor, nodes: Tensor | None,
        scale: float, chunk_size: int, products: torch.dtype,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.level_scales = in_rows(q), in_rows(k), in_rows(v), in_rows(level_scales)
        self.log_decay = log_decay
        self.B, self.T, self.G, self.K = q.shape
        self.H, self.V = v.shape[2:]
        self.L, self.R, self.scale, self.C = level_scales.shape[3], self.H // self.G, scale, chunk_size
        self.dtype, dot, precision = DOT_TYPES[products]
        self.nodes = None if nodes is None else nodes.to(self.dtype).contiguous()
        self.has_nodes = nodes is not None
        self.dots = dict(DOT=dot, PRECISION=precision)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.v.device)

    def strides(self, *names: str) -> tuple[int, ...]:
        return tuple(stride for name in names for stride in getattr(self, name).stride()[:3])
