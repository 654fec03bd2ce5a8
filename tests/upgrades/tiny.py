"""Tiny models of transformers with random weights everywhere, to be upgraded."""

import contextlib
import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BailingHybridConfig,
    BailingHybridForCausalLM,
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Glm5NextConfig,
    Glm5NextForConditionalGeneration,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    KimiLinearConfig,
    KimiLinearForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

import loglinear

COMMON = dict(
    vocab_size=90, hidden_size=32, num_hidden_layers=3, intermediate_size=48, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
SPECIAL = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0)
MAMBA2 = dict(
    vocab_size=90, hidden_size=32, num_hidden_layers=3, num_heads=4, head_dim=16, n_groups=2, state_size=8,
    chunk_size=16, **SPECIAL,
)  # fmt: skip
ATTENTION = dict(vocab_size=90, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2)
MAMBA2_HYBRID = dict(
    num_hidden_layers=3, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=16,
    **ATTENTION, **SPECIAL,
)  # fmt: skip
GRANITE = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"], position_embedding_type="rope",
    num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=48, embedding_multiplier=1.5,
    residual_multiplier=0.7, attention_multiplier=0.3, logits_scaling=2.0,
)  # fmt: skip
FALCON = dict(
    mamba_d_ssm=64, ssm_multipliers=[0.7, 1.3, 0.9, 1.2, 0.8], ssm_in_multiplier=1.2, ssm_out_multiplier=0.9,
    attention_in_multiplier=0.8, attention_out_multiplier=1.1, key_multiplier=0.7, embedding_multiplier=1.5,
    lm_head_multiplier=0.5, mlp_multipliers=[0.9, 1.1],
)  # fmt: skip
NEMOTRON = dict(
    layers_block_type=["linear_attention", "full_attention", "moe", "linear_attention", "mlp"], head_dim=16,
    mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=8, chunk_size=16, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, **ATTENTION, **SPECIAL,
)  # fmt: skip
ZAMBA2 = dict(
    layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"], num_hidden_layers=4,
    n_mamba_heads=4, mamba_ngroups=2, mamba_d_state=8, chunk_size=16, use_mem_rope=True, adapter_rank=4,
    **ATTENTION, **SPECIAL,
)  # fmt: skip
RANKS = dict(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
ROUTED = dict(num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1)
HYBRID = dict(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"])
LATENT = dict(n_shared_experts=1, **ATTENTION, **HYBRID, **RANKS, **ROUTED, **SPECIAL)
GLM5 = dict(
    linear_num_heads=4,
    linear_head_dim=8,
    linear_lower_bound=-2.0,
    q_lora_rank=8,
    index_topk=64,
    index_kpool=4,
    index_head_dim=8,
    index_n_heads=2,
    hc_mult=2,
    mlp_layer_types=["dense", "sparse", "sparse"],
    swiglu_limit=2.0,
    n_routed_experts=4,
    indexer_types=["full"] * 3,
    **{**LATENT, "qk_rope_head_dim": 0},
)
LEVELS = dict(num_levels=6, chunk_size=4)  # a few dozen tokens cross chunks and levels


def qwen3_next(**sizes) -> PreTrainedModel:
    return Qwen3NextForCausalLM(Qwen3NextConfig(**{**COMMON, **EXPERTS, **sizes}))


def qwen3_5(**sizes) -> PreTrainedModel:
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**COMMON, **sizes}))


def qwen3_5_moe(**sizes) -> PreTrainedModel:
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**{**COMMON, **EXPERTS, **sizes}))


def olmo_hybrid(**sizes) -> PreTrainedModel:
    return OlmoHybridForCausalLM(OlmoHybridConfig(**{**COMMON, **sizes}))


def mamba2(**sizes) -> PreTrainedModel:
    return Mamba2ForCausalLM(Mamba2Config(**{**MAMBA2, **sizes}))


def bamba(**sizes) -> PreTrainedModel:
    return BambaForCausalLM(BambaConfig(**{**MAMBA2_HYBRID, "attn_layer_indices": [1], **sizes}))


def granitemoehybrid(**sizes) -> PreTrainedModel:
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**{**MAMBA2_HYBRID, **GRANITE, **sizes}))


def falcon_h1(**sizes) -> PreTrainedModel:
    return FalconH1ForCausalLM(FalconH1Config(**{**MAMBA2_HYBRID, **FALCON, **sizes}))


def nemotron_h(**sizes) -> PreTrainedModel:
    return NemotronHForCausalLM(NemotronHConfig(**{**NEMOTRON, **sizes}))


def zamba2(**sizes) -> PreTrainedModel:
    return Zamba2ForCausalLM(Zamba2Config(**{**ZAMBA2, **sizes}))


def kimi_linear(**sizes) -> PreTrainedModel:
    own = dict(linear_num_heads=4, linear_head_dim=8)
    return KimiLinearForCausalLM(KimiLinearConfig(**{**LATENT, **own, **sizes}))


def bailing_hybrid(**sizes) -> PreTrainedModel:
    own = dict(head_dim=16, first_k_dense_replace=1)
    return BailingHybridForCausalLM(BailingHybridConfig(**{**LATENT, **own, **sizes}))


def glm5_next(**sizes) -> PreTrainedModel:
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    return Glm5NextForConditionalGeneration(Glm5NextConfig(text_config={**GLM5, **sizes}, vision_config=vision))


MODELS = {
    "qwen3_next": qwen3_next,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "olmo_hybrid": olmo_hybrid,
    "kimi_linear": kimi_linear,
    "bailing_hybrid": bailing_hybrid,
    "glm5_next": glm5_next,
    "mamba2": mamba2,
    "bamba": bamba,
    "granitemoehybrid": granitemoehybrid,
    "falcon_h1": falcon_h1,
    "nemotron_h": nemotron_h,
    "zamba2": zamba2,
}
# transformers has no causal language model of GLM-5-next, and its attention cannot take packed documents.
LANGUAGE_MODELS = [family for family in MODELS if family != "glm5_next"]


def auto_class_of(family: str) -> type:
    """Return the Auto class that loads a family."""
    return AutoModelForImageTextToText if family == "glm5_next" else AutoModelForCausalLM


def original(family: str, dtype: torch.dtype = torch.float64, **sizes) -> PreTrainedModel:
    """Return a model with weights that no initialisation hides: norms are not 1, biases are not 0."""
    torch.manual_seed(0)
    model = MODELS[family](**sizes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() == 1 and ("norm" in name or name.rsplit(".", 1)[-1] in ("D", "A_log", "dt_bias")):
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return with_eager_experts(model).to(dtype)


def with_eager_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with the experts of torch: the others know no float64, and round by where weights lie."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def upgraded(model: PreTrainedModel, **options) -> PreTrainedModel:
    """Return an upgraded copy."""
    model = copy.deepcopy(model)
    loglinear.upgrade(model, **{**LEVELS, **options})
    return model


def trained(model: PreTrainedModel, **options) -> PreTrainedModel:
    """Return an upgraded copy whose new weights are not neutral, so results depend on which level is read."""
    model = upgraded(model, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loglinear.new_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 * noise)
    return model


def tokens(rows: int, time: int, seed: int = 1) -> torch.Tensor:
    """Ordinary tokens, none of them special."""
    return torch.randint(3, 90, (rows, time), generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return True for float64 tensors that differ by the order of sums alone."""
    return torch.allclose(a, b, rtol=0, atol=1e-10 * b.abs().max().item())


@contextlib.contextmanager
def wide():
    """Leave float64 tensors alone where transformers' torch code narrows them to float32."""
    to, single, cast = torch.Tensor.to, torch.Tensor.float, torch.Tensor.type

    def keep(self, *args, **kwargs):
        narrow = torch.float32 in args or kwargs.get("dtype") is torch.float32
        return self if narrow and self.dtype is torch.float64 else to(self, *args, **kwargs)

    torch.Tensor.to, torch.Tensor.float = keep, lambda self: self if self.dtype is torch.float64 else single(self)
    torch.Tensor.type = lambda self, *args: self.to(*args) if args == (torch.float32,) else cast(self, *args)
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float, torch.Tensor.type = to, single, cast
