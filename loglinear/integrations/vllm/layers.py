# T tokens, D hidden size, P pages, F numbers of a page, H query heads, G key/value heads, K head width
"""The layers of a block inside of vLLM: our mixer with its states in pages, and our attention with vLLM's cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention as CachedAttention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from loglinear.integrations.vllm import STATES
from loglinear.integrations.vllm.batch import ROWS, Batch, Slab
from loglinear.integrations.vllm.pages import PageLayout, StepMemory
from loglinear.layers import Attention, Mixer, MixerDecodeState
from loglinear.layers.attention import rotate
from loglinear.models import LogLinearConfig
from loglinear.variants import HeadBias


class PagedMixer(Mixer, MambaBase):  # type: ignore[misc]  # the bases have other metaclasses
    """A `Mixer` of tokens [T, D] of many sequences, whose states lie in vLLM's pages.

    Args:
        vllm_config: The settings of vLLM.
        memory: The memory of the copies, which all layers share.
        prefix: The layer's name.
    """

    kv_cache: tuple[Tensor, ...]
    """The pages [P, F], once vLLM has allocated them."""

    def __init__(self, vllm_config: VllmConfig, memory: StepMemory, prefix: str) -> None:
        config: LogLinearConfig = vllm_config.model_config.hf_config
        super().__init__(config.hidden_size, config.heads, **config.mixer_options)
        for part in self.modules():
            if isinstance(part, HeadBias):
                part.float()
        self.layout = PageLayout.of(config, vllm_config.model_config.max_model_len)
        self.memory, self.prefix = memory, prefix
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum[STATES]

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.layout.numbers,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the output [T, D] and change the states of the batch's sequences in place."""
        batches: Any = get_forward_context().attn_metadata
        if batches is None:  # vLLM measures the memory of a forward pass
            self.memory.rows(self, ROWS, x)
            return self.mix(x[None])[0][0]
        batch: Batch = batches[self.prefix]
        y = torch.zeros_like(x)  # tokens beyond those of the slabs are padding
        for slab in batch.slabs:
            y[slab.tokens] = self._work(x[slab.tokens], slab)
        return y

    def _work(self, x: Tensor, slab: Slab) -> Tensor:
        """Return the outputs of a slab's tokens."""
        (pages,) = self.kv_cache
        state = self.memory.rows(self, len(slab.pages), x)
        if slab.packing is None:
            self.layout.read(pages, slab, state)
            y, _ = self.mix(x[:, None], state=state)
            self.layout.write_step(pages, slab, state)
            return y[:, 0]
        if not slab.is_new:
            self.layout.read(pages, slab, state)
        before = None if slab.is_new else state.state()
        y, after = self.mix(x[None], slab.packing, before, return_state=True)
        self.layout.write(pages, slab, MixerDecodeState.of(after))  # type: ignore[arg-type]  # of a call without steps
        return y[0]


class PagedAttention(Attention):
    """An `Attention` of tokens [T, D] whose keys and values lie in vLLM's cache.

    Raises:
        ValueError: vLLM's attention does not support heads of this width.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        config: LogLinearConfig = vllm_config.model_config.hf_config
        heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim
        assert heads and groups and width
        super().__init__(config.hidden_size, heads, groups, width)
        self.attn = CachedAttention(
            heads,
            width,
            width**-0.5,
            num_kv_heads=groups,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )
        backend = self.attn.attn_backend
        if not backend.supports_head_size(width):
            widths = ", ".join(str(size) for size in backend.get_supported_head_sizes())
            raise ValueError(f"attention_head_dim must be one of {widths} in vLLM's {backend.get_name()}, got {width}")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        """Return the output [T, D]; cos and sin are those of `rotary_tables`, [1, T, K / 2]."""
        q, k, v = self.qkv_proj(x).split(self.widths, dim=-1)
        q, k = (rotate(t.unflatten(-1, (-1, self.head_dim))[None], cos, sin)[0].flatten(-2) for t in (q, k))
        return self.out_proj(self.attn(q, k, v))
