# B batch, T time, G key heads, H value heads, K key, V value
"""The base of upgraded Gated DeltaNet mixers."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from loglinear.upgrades.mixer import UpgradedMixer
from loglinear.variants import HeadSizes
from loglinear.variants.base import at_least_float32


class UpgradedGatedDeltaNet(UpgradedMixer):
    """Gated DeltaNet as transformers computes it: the gated delta rule, with q and k of length 1.

        log a = -exp(A_log) softplus(W_a x + dt_bias),    b = beta_scale sigmoid(W_b x)
        output = W_o (norm(y) * silu(z))

    `_project` returns the gate logits (W_a x, W_b x) as the source. Their dtype is the model's: b is rounded to it, as
    in transformers.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464, equation 10.
    """

    transition = "delta_rule"
    l2_normalize = True
    key_dim: int  # G K
    value_dim: int  # H V
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    norm: Any
    out_proj: Any

    @classmethod
    def refusals(cls, theirs: Any) -> list[str]:
        if theirs.activation not in ("silu", "swish"):
            return [f"hidden_act={theirs.activation!r} (silu is supported)"]
        return []

    @classmethod
    def sizes(cls, theirs: Any) -> HeadSizes:
        return HeadSizes(theirs.num_v_heads, theirs.num_k_heads, theirs.head_k_dim, theirs.head_v_dim)

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.heads.key_dim**-0.5

    @property
    def beta_scale(self) -> float:
        """The largest b; above 1, a transition can have negative eigenvalues."""
        return 1.0

    @property
    def output_parts(self) -> tuple[nn.Module, nn.Module]:
        """The gated norm and the output projection."""
        return self.norm, self.out_proj

    def _operands(self, source: tuple[Tensor, Tensor], qkv: Tensor) -> tuple[list[Tensor | None], Tensor]:
        gate, beta = source
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q, k = (t.unflatten(-1, (self.heads.num_groups, self.heads.key_dim)) for t in (q, k))
        v = v.unflatten(-1, (self.heads.num_heads, self.heads.head_dim))
        log_decay = -at_least_float32(self.A_log).exp() * F.softplus(at_least_float32(gate) + self.dt_bias)
        return [q, k, v, log_decay, at_least_float32(beta.sigmoid() * self.beta_scale)], v

    def _output(self, y: Tensor, v: Tensor, z: Tensor) -> Tensor:
        norm, projection = self.output_parts
        normed = norm(y.flatten(0, -2), z.reshape(-1, z.shape[-1]))  # two dimensions, as transformers' kernels want
        return projection(normed.view(*y.shape[:2], -1))
