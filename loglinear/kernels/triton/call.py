"""The delta rule's call on the host: dtypes, strides and sizes."""

# B batch, T time, G groups, H heads, K key, V value, L levels
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.triton.inputs import DOT_TYPES, in_rows


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
        self.dtype, math = DOT_TYPES[products]
        self.nodes = None if nodes is None else nodes.to(self.dtype).contiguous()
        self.has_nodes = nodes is not None
        self.dots = dict(MATH=math)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.v.device)

    def strides(self, *names: str) -> tuple[int, ...]:
        return tuple(stride for name in names for stride in getattr(self, name).stride()[:3])
