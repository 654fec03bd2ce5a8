# T tokens, D hidden size, V vocabulary
"""`LogLinearForCausalLM` as vLLM runs it: tokens of many sequences in one row, states and keys in vLLM's pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching

from loglinear.integrations.vllm.layers import PagedAttention, PagedMixer
from loglinear.integrations.vllm.pages import PageLayout, StepMemory
from loglinear.layers import SwiGLU, rotary_tables
from loglinear.layers.former_names import current_name
from loglinear.models import LogLinearConfig


class Block(nn.Module):
    """One block: x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, vllm_config: VllmConfig, layer_type: str, memory: StepMemory, prefix: str) -> None:
        super().__init__()
        config: LogLinearConfig = vllm_config.model_config.hf_config
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer: PagedAttention | PagedMixer
        if layer_type == "full_attention":
            self.mixer = PagedAttention(vllm_config, f"{prefix}.mixer")
        else:
            self.mixer = PagedMixer(vllm_config, memory, f"{prefix}.mixer")
        self.mlp: SwiGLU | None = None
        if config.intermediate_size:
            self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        normed = self.mixer_norm(x)
        x = x + (self.mixer(normed, *rotary) if isinstance(self.mixer, PagedAttention) else self.mixer(normed))
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """The decoder without a head: tokens [T] to hidden states [T, D]."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: LogLinearConfig = vllm_config.model_config.hf_config
        assert config.layer_types is not None
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        memory = StepMemory()
        self.layers = nn.ModuleList(
            [Block(vllm_config, kind, memory, f"{prefix}.layers.{i}") for i, kind in enumerate(config.layer_types)]
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        rotary = rotary_tables(positions[None], self.config.attention_head_dim or 0, self.config.rope_theta)
        for layer in self.layers:
            x = layer(x, rotary)
        return self.norm(x)


class LogLinearForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """The language model of any variant, routed or not, with or without full-attention layers."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        model = vllm_config.model_config
        return ((PageLayout.of(model.hf_config, model.max_model_len).numbers,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        return (get_temporal_copy_spec,)  # a page is copied whole

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LogLinearConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model = Decoder(vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings [T, D] of tokens [T]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the hidden states [T, D] of tokens [T] or of their embeddings [T, D], at positions [T]."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.model(inputs_embeds, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits [T, V] of hidden states [T, D]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint, also under former names; ValueError for a weight too many or too few."""
        parameters = dict(self.named_parameters())
        loaded = set()
        for stored_name, weight in weights:
            name = current_name(stored_name)
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if name not in parameters:
                raise ValueError(f"the checkpoint holds a weight that the model does not have: {stored_name}")
            load = getattr(parameters[name], "weight_loader", default_weight_loader)
            load(parameters[name], weight)
            loaded.add(name)
        if missing := parameters.keys() - loaded:
            raise ValueError(f"the checkpoint lacks weights of the model, such as {min(missing)}")
        return loaded
