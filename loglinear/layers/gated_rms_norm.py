# B batch, T time, H heads, V value
"""The gated output norm of the mixers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loglinear.variants.base import at_least_float32


class GatedRMSNorm(nn.Module):
    """The RMS norm of a mixer's output y [B, T, H, V], gated by z [B, T, H V]: (y, z) -> [B, T, H V].

    Without a gate (z is None) silu(z) is 1. With `sigmoid` the gate is sigmoid(z).

    Args:
        num_heads: H.
        head_dim: V.
        num_groups: G.
        gate_first: True for norm(y * silu(z)) over the H V / G channels of each group together, with one weight per
            channel (Mamba-2, arXiv 2405.21060, section 7). False for norm(y) * silu(z) per head, with one weight [V]
            for all heads (Gated DeltaNet, arXiv 2412.06464).
        eps: The epsilon of the norm.
        sigmoid: True for sigmoid(z) in the place of silu(z) (Kimi Delta Attention, arXiv 2510.26692).
    """

    def __init__(
        self, num_heads: int, head_dim: int, num_groups: int, *, gate_first: bool, eps: float, sigmoid: bool = False
    ) -> None:
        super().__init__()
        self.gate_first, self.eps, self.sigmoid = gate_first, eps, sigmoid
        self.width = num_heads * head_dim // num_groups if gate_first else head_dim
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim if gate_first else head_dim))

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        wide, weight = at_least_float32(y), at_least_float32(self.weight)
        activation = torch.sigmoid if self.sigmoid else F.silu
        gate = None if z is None else activation(at_least_float32(z))
        if self.gate_first:
            wide = wide.flatten(-2) if gate is None else wide.flatten(-2) * gate
            wide = wide.unflatten(-1, (-1, self.width))
        is_shared = len(weight) == self.width  # rms_norm cannot take one weight for each of several groups
        normed = F.rms_norm(wide, (self.width,), weight if is_shared else None, self.eps).flatten(-2)
        if not is_shared:
            normed = normed * weight
        return (normed if self.gate_first or gate is None else normed * gate).to(y.dtype)
