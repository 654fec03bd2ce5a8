# B batch, T time, D hidden size
"""Qwen3.5, text: Gated DeltaNet with one projection for q, k, v and one each for z, b and a."""

from typing import Any

from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from loglinear.upgrades.gated_delta_net import UpgradedGatedDeltaNet


class Qwen3_5Projections(UpgradedGatedDeltaNet):
    """The projections of Qwen3.5, which its mixture of experts shares."""

    in_proj_qkv: Any
    in_proj_z: Any
    in_proj_a: Any
    in_proj_b: Any

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        z = self.in_proj_z(x).unflatten(-1, (self.heads.num_heads, self.heads.head_dim))
        return z, self.in_proj_qkv(x), (self.in_proj_a(x), self.in_proj_b(x))


class LogLinearQwen3_5GatedDeltaNet(Qwen3_5Projections, Qwen3_5GatedDeltaNet):
    """The mixer of a dense Qwen3.5."""

    replaces = Qwen3_5GatedDeltaNet


MIXERS = {"Qwen3_5GatedDeltaNet": LogLinearQwen3_5GatedDeltaNet}
