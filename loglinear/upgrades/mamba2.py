# B batch, T time, G groups, H heads, K state size, V head size
"""The base of upgraded Mamba-2 mixers."""

import math
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from loglinear.upgrades.mixer import UpgradedMixer
from loglinear.variants import HeadSizes
from loglinear.variants.base import at_least_float32

NO_LIMIT = (0.0, math.inf)  # of a softplus, the usual one


class UpgradedMamba2(UpgradedMixer):
    """Mamba-2 as transformers computes it, with q = C, k = B and v = x dt.

        [z, (x, B, C), dt] = W_in u ;  x, B, C = silu(conv(x, B, C))
        dt = clamp(softplus(dt + dt_bias), time_step_limit) ;  log a = -exp(A_log) dt
        output = W_out norm(y + D x, z)

    Every token has the limits of its time step. transformers forgets them in steps of one token.

    Source: Dao, Gu, "Transformers are SSMs", arXiv 2405.21060, sections 6 and 7.
    """

    transition = "scalar_gate"
    l2_normalize = False
    scale = 1.0
    activation_option: ClassVar[str] = "hidden_act"
    """The name of the convolution's activation in the configuration."""
    intermediate_size: int  # H V
    time_step_limit: Any
    chunk_size: Any
    layer_idx: Any
    in_proj: Any
    out_proj: Any
    norm: Any
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    D: nn.Parameter

    @classmethod
    def refusals(cls, theirs: Any) -> list[str]:
        if theirs.activation not in ("silu", "swish"):
            return [f"{cls.activation_option}={theirs.activation!r} (silu is supported)"]
        return []

    @classmethod
    def sizes(cls, theirs: Any) -> HeadSizes:
        return HeadSizes(theirs.num_heads, theirs.n_groups, theirs.ssm_state_size, theirs.head_dim)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        widths = [self.intermediate_size, self.conv.channels, self.heads.num_heads]
        z, xBC, dt = self._projections(x).split(widths, dim=-1)
        return z, xBC, dt

    def _operands(self, source: Tensor, qkv: Tensor) -> tuple[list[Tensor | None], Tensor]:
        state_width = self.heads.num_groups * self.heads.key_dim
        v, k, q = qkv.split([self.intermediate_size, state_width, state_width], dim=-1)
        q, k = (t.unflatten(-1, (self.heads.num_groups, self.heads.key_dim)) for t in (q, k))
        v = v.unflatten(-1, (self.heads.num_heads, self.heads.head_dim))
        dt = F.softplus(at_least_float32(source) + self.dt_bias)
        if tuple(self.time_step_limit) != NO_LIMIT:
            dt = dt.clamp(*self.time_step_limit)
        log_decay = -at_least_float32(self.A_log).exp() * dt
        return [q, k, (v * dt.unsqueeze(-1)).to(v.dtype), log_decay], v

    def _output(self, y: Tensor, v: Tensor, z: Tensor) -> Tensor:
        skipped = y + at_least_float32(self.D).unsqueeze(-1) * v  # the sum has the wider dtype
        return self.out_proj(self._gated(skipped.flatten(-2), z).to(y.dtype))

    def _projections(self, x: Tensor) -> Tensor:
        """Return z, x, B, C and dt, in this order [B, T, 2 H V + 2 G K + H]."""
        return self.in_proj(x)

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the output [B, T, H V] before its projection, in at least float32: gate and norm."""
        return self.norm(y, z)
