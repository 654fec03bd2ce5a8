# B batch, T time, D hidden size, G key heads, H value heads, K key, V value
"""Qwen3-Next: Gated DeltaNet whose projections interleave by key head."""

import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from loglinear.upgrades.gated_delta_net import UpgradedGatedDeltaNet


class LogLinearQwen3NextGatedDeltaNet(UpgradedGatedDeltaNet, Qwen3NextGatedDeltaNet):
    """`in_proj_qkvz` gives q, k, v and z of one key head after the other, `in_proj_ba` its b and a."""

    replaces = Qwen3NextGatedDeltaNet

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        q, k, v, z, beta, gate = self.fix_query_key_value_ordering(self.in_proj_qkvz(x), self.in_proj_ba(x))
        return z, torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1), (gate, beta)


MIXERS = {"Qwen3NextGatedDeltaNet": LogLinearQwen3NextGatedDeltaNet}
