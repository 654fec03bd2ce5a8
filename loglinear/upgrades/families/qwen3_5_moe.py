"""Qwen3.5 with a mixture of experts, text: its mixer is that of Qwen3.5."""

from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

from loglinear.upgrades.families.qwen3_5 import Qwen3_5Projections


class LogLinearQwen3_5MoeGatedDeltaNet(Qwen3_5Projections, Qwen3_5MoeGatedDeltaNet):
    """The mixer of a Qwen3.5 with experts."""

    replaces = Qwen3_5MoeGatedDeltaNet


MIXERS = {"Qwen3_5MoeGatedDeltaNet": LogLinearQwen3_5MoeGatedDeltaNet}
