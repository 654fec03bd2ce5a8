# B batch, T time, D hidden size, H heads, K key, V value
"""The base of upgraded Kimi Delta Attention mixers."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loglinear.models import LogLinearConfig
from loglinear.upgrades.mixer import UpgradedMixer, change_class
from loglinear.variants import HeadSizes
from loglinear.variants.base import at_least_float32, diagonal_log_decay


class UpgradedForgetGate(nn.Module):
    """The gate of Kimi Delta Attention: the log decays [B, T, H, K] from hidden states [B, T, D], at least in float32.

    A subclass also inherits from transformers' class, whose modules become modules of it, and defines `logits`.
    """

    num_heads: Any
    head_dim: Any
    A_log: nn.Parameter
    dt_bias: nn.Parameter

    @property
    def bound(self) -> float | None:
        """The least log decay of a token."""
        return None

    def logits(self, x: Tensor) -> Tensor:
        """Return the gate logits [B, T, H K]."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits = self.logits(hidden_states).unflatten(-1, (self.num_heads, self.head_dim))
        return diagonal_log_decay(logits, self.A_log, self.dt_bias, self.bound)


class LowRankForgetGate(UpgradedForgetGate):
    """The gate with two projections, through K features."""

    f_a_proj: Any
    f_b_proj: Any

    def logits(self, x: Tensor) -> Tensor:
        return self.f_b_proj(self.f_a_proj(x))


class UpgradedKimiDeltaAttention(UpgradedMixer):
    """Kimi Delta Attention as transformers computes it: the delta rule with a diagonal gate, q and k of length 1.

        log a = -exp(A_log) softplus(gate(x) + dt_bias), or lower_bound sigmoid(exp(A_log) (gate(x) + dt_bias))
        b = sigmoid(W_b x),    output = W_o (norm(y) * sigmoid(z))

    The dtype of W_b x is the model's: b is rounded to it, as in transformers.

    Source: Kimi Team, "Kimi Linear", arXiv 2510.26692, equations 1 and 9.
    """

    transition = "delta_rule"
    diagonal_gate = True
    l2_normalize = True
    gate_class: ClassVar[type[UpgradedForgetGate]]
    """The class of the gate."""
    q_proj: Any
    k_proj: Any
    v_proj: Any
    b_proj: Any
    o_proj: Any
    o_norm: Any
    forget_gate: Any
    g_a_proj: Any
    g_b_proj: Any

    @classmethod
    def refusals(cls, theirs: Any) -> list[str]:
        if theirs.activation not in ("silu", "swish"):
            return [f"hidden_act={theirs.activation!r} (silu is supported)"]
        return []

    @classmethod
    def sizes(cls, theirs: Any) -> HeadSizes:
        return HeadSizes(theirs.num_heads, theirs.num_heads, theirs.head_dim, theirs.head_dim)

    @classmethod
    def become(cls, theirs: Any, choices: LogLinearConfig) -> None:
        super().become(theirs, choices)
        change_class(theirs.forget_gate, cls.gate_class)

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.heads.key_dim**-0.5

    def _output_gate(self, x: Tensor) -> Tensor:
        """Return z [B, T, H V]."""
        return self.g_b_proj(self.g_a_proj(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads.num_heads, -1))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        return self._heads(self._output_gate(x)), qkv, (self.forget_gate(x), self.b_proj(x))

    def _operands(self, source: tuple[Tensor, Tensor], qkv: Tensor) -> tuple[list[Tensor | None], Tensor]:
        log_decay, beta = source
        q, k, v = (self._heads(part) for part in qkv.chunk(3, dim=-1))
        return [q, k, v, log_decay, at_least_float32(beta.sigmoid())], v

    def _output(self, y: Tensor, v: Tensor, z: Tensor) -> Tensor:
        return self.o_proj(self.o_norm(y, z).flatten(-2))
