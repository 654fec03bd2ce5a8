# B batch, T time (new columns), S columns so far, G key/value heads, K head width
"""What generation keeps: a fixed-size state per linear layer, keys and values per full-attention layer."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from loglinear.layers import MixerState
from loglinear.models.configuration import LogLinearConfig


class LinearStateLayer(CacheLayerMixin):
    """The state of one mixer: C raw tokens and the block states (design: Fenwick tree), and the convolution's inputs.

    Rows stand at positions of their own (`state.fenwick.position`, padding not counted); `columns` counts the columns
    of the padded batch, which is what `generate` slices its inputs by.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: MixerState | None = None
        self.columns = 0

    def store(self, state: MixerState | None, new_columns: int) -> None:
        self.state = state
        self.columns += new_columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a linear layer keeps no keys and values; use LinearStateLayer.store")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a linear layer keeps no keys and values; use LinearStateLayer.store")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.columns = None, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.state is not None:
            self.state = self.state.index_select(beam_idx.to(self.state.conv.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.index_select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.conv.shape[0], device=self.state.conv.device)
            self.state = self.state.index_select(rows.repeat_interleave(repeats))

    @property
    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes


class KeyValueLayer(DynamicLayer):
    """Keys and values of one full-attention layer; grows with the sequence."""

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes


class LogLinearCache(Cache):
    """The cache of `LogLinearModel`: `layers[i]` belongs to layer i.

    `real` [B, S] remembers for the full-attention layers which columns were tokens and which padding (None: no padding
    so far), so a continuation needs no attention mask. The mixers' states have no padding in them.
    """

    def __init__(self, config: LogLinearConfig) -> None:
        assert config.layer_types is not None
        kinds: dict[str, type[LinearStateLayer | KeyValueLayer]] = {
            "linear_attention": LinearStateLayer,
            "full_attention": KeyValueLayer,
        }
        super().__init__(layers=[kinds[layer_type]() for layer_type in config.layer_types])
        self.real: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all states, keys and values."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, LinearStateLayer | KeyValueLayer))

    def extend_real(self, real_BT: Tensor | None, rows: int, time: int, device: torch.device) -> Tensor | None:
        """Notes which of T new columns are tokens (None: all); returns all columns' [B, S + T], None if no padding."""
        if real_BT is None and self.real is None:
            return None
        past = self.get_seq_length()
        before = torch.ones(rows, past, dtype=torch.bool, device=device) if self.real is None else self.real
        now = torch.ones(rows, time, dtype=torch.bool, device=device) if real_BT is None else real_BT
        self.real = torch.cat([before, now], dim=1)
        return self.real

    def reset(self) -> None:
        super().reset()
        self.real = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.real is not None:
            self.real = self.real.index_select(0, beam_idx.to(self.real.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.real is not None:
            self.real = self.real[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.real is not None:
            self.real = self.real.repeat_interleave(repeats, dim=0)
