"""GLM-5-next: Kimi Delta Attention in some layers, sparse latent attention in the others, with experts and images."""

from typing import Any

from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextForgetGate, Glm5NextTextLinearAttention

from loglinear.upgrades.kimi_delta_attention import LowRankForgetGate, UpgradedKimiDeltaAttention


class LogLinearGlm5NextTextForgetGate(LowRankForgetGate, Glm5NextTextForgetGate):
    """The gate of a GLM-5-next, with or without the lower bound."""

    safe_gate_lower_bound: Any

    @property
    def bound(self) -> float | None:
        return self.safe_gate_lower_bound


class LogLinearGlm5NextTextLinearAttention(UpgradedKimiDeltaAttention, Glm5NextTextLinearAttention):
    """The mixer of a GLM-5-next, whose other layers read the tokens that an indexer selects from the whole row."""

    replaces = Glm5NextTextLinearAttention
    gate_class = LogLinearGlm5NextTextForgetGate
    packs_documents = False


MIXERS = {"Glm5NextTextLinearAttention": LogLinearGlm5NextTextLinearAttention}
