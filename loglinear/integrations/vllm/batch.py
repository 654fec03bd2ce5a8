# N rows, T tokens
"""The rows of one forward pass of vLLM: sequences with one token, then pieces of prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor, split_decodes_and_prefills

from loglinear.integrations.vllm import STATES
from loglinear.layers import Packing

ROWS = 64  # of one slab, whose states are copied: this bounds the memory of the copies


@dataclass
class Slab:
    """Rows that a layer works on at once."""

    tokens: slice
    """Their tokens among those of the batch."""
    pages: Tensor
    """[N] int64, the page of each row."""
    position: Tensor
    """[N] int64, the tokens that each row has read."""
    host_position: Tensor
    """The same on the CPU."""
    packing: Packing | None
    """The pieces of prompts. None: each row has one token."""
    new: Tensor | None = field(init=False)
    """[n] int64, the rows that have read no token. None: no row."""

    def __post_init__(self) -> None:
        self._changed: dict[int, Tensor | None] = {}
        self.new = self._rows_where(self.host_position == 0)

    @property
    def is_new(self) -> bool:
        """True if no row has read a token."""
        return self.new is not None and len(self.new) == len(self.pages)

    def changed(self, chunk: int) -> Tensor | None:
        """Return the rows [n] that are new or whose next token fills a chunk of so many tokens. None: no row."""
        if chunk not in self._changed:
            is_full = self.host_position % chunk == chunk - 1
            self._changed[chunk] = self._rows_where(is_full | (self.host_position == 0))
        return self._changed[chunk]

    def _rows_where(self, condition: Tensor) -> Tensor | None:
        rows = condition.nonzero()[:, 0]
        return rows.to(self.pages.device, non_blocking=True) if len(rows) else None


@dataclass
class Batch:
    """The metadata of the linear layers in one forward pass."""

    slabs: list[Slab]


class BatchBuilder(AttentionMetadataBuilder[Batch]):
    """Makes a `Batch`, once for all layers that share their pages."""

    reorder_batch_threshold = 1

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.taps = vllm_config.model_config.hf_config.taps

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        common = common_attn_metadata
        mode = self.vllm_config.cache_config.mamba_cache_mode
        table = mamba_get_block_table_tensor(common.block_table_tensor, common.seq_lens, self.kv_cache_spec, mode)
        ends, host_ends = (
            x[: common.num_reqs + 1].long() for x in (common.query_start_loc, common.query_start_loc_cpu)
        )
        position = common.seq_lens[: common.num_reqs] - ends.diff()
        assert common.seq_lens_cpu_upper_bound is not None  # exact without speculative decoding
        host_position = common.seq_lens_cpu_upper_bound[: common.num_reqs] - host_ends.diff()
        steps, pieces, *_ = split_decodes_and_prefills(common, decode_threshold=1)
        slabs = []
        for begin, end in [(0, steps), (steps, steps + pieces)]:
            for first in range(begin, end, ROWS):
                last = min(first + ROWS, end)
                tokens = slice(int(host_ends[first]), int(host_ends[last]))
                rows = slice(first, last)
                packing = None
                if begin == steps:
                    boundaries = ends[first : last + 1] - ends[first]
                    packing = Packing.from_cu_seqlens(boundaries, tokens.stop - tokens.start, self.taps)
                slabs.append(Slab(tokens, table[rows, 0].long(), position[rows].long(), host_position[rows], packing))
        return Batch(slabs)


class LogLinearBackend(AttentionBackend):
    """vLLM's name for the states of our linear layers and the builder of their metadata."""

    @staticmethod
    def get_name() -> str:
        return STATES

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        return BatchBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True
