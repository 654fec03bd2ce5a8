# B batch, T time, D hidden size
"""OLMo hybrid: Gated DeltaNet with a projection for each operand, and transitions with negative eigenvalues."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

from loglinear.upgrades.gated_delta_net import UpgradedGatedDeltaNet


class LogLinearOlmoHybridGatedDeltaNet(UpgradedGatedDeltaNet, OlmoHybridGatedDeltaNet):
    """With `linear_allow_neg_eigval`, as published, b = 2 sigmoid(W_b x)."""

    replaces = OlmoHybridGatedDeltaNet

    @property
    def beta_scale(self) -> float:
        return 2.0 if self.allow_neg_eigval else 1.0

    @property
    def output_parts(self) -> tuple[Any, Any]:
        return self.o_norm, self.o_proj

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        z = self.g_proj(x).unflatten(-1, (self.heads.num_heads, self.heads.head_dim))
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        return z, qkv, (self.a_proj(x), self.b_proj(x))


MIXERS = {"OlmoHybridGatedDeltaNet": LogLinearOlmoHybridGatedDeltaNet}
