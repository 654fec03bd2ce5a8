# B batch, T time, D hidden size, H heads, K key
"""Bailing hybrids: Kimi Delta Attention with gates of full rank in some layers, latent attention in the others."""

from typing import Any

from torch import Tensor
from transformers.models.bailing_hybrid.modeling_bailing_hybrid import (
    BailingHybridDeltaAttention,
    BailingHybridForgetGate,
)

from loglinear.upgrades.kimi_delta_attention import UpgradedForgetGate, UpgradedKimiDeltaAttention


class LogLinearBailingHybridForgetGate(UpgradedForgetGate, BailingHybridForgetGate):
    """The gate of a Bailing hybrid, whose log decays have the dtype of the hidden states, as in transformers."""

    safe_gate: Any
    lower_bound: Any
    f_proj: Any

    @property
    def bound(self) -> float | None:
        return self.lower_bound if self.safe_gate else None

    def logits(self, x: Tensor) -> Tensor:
        return self.f_proj(x)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).to(hidden_states.dtype)


class LogLinearBailingHybridDeltaAttention(UpgradedKimiDeltaAttention, BailingHybridDeltaAttention):
    """The mixer of a Bailing hybrid."""

    replaces = BailingHybridDeltaAttention
    gate_class = LogLinearBailingHybridForgetGate
    g_proj: Any

    def _output_gate(self, x: Tensor) -> Tensor:
        return self.g_proj(x)


MIXERS = {"BailingHybridDeltaAttention": LogLinearBailingHybridDeltaAttention}
