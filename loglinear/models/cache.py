# B batch, T time (new columns), S columns so far, G key/value heads, K head width
"""The cache of generation: a fixed-size state per linear layer, keys and values per full-attention layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from loglinear.layers import MixerDecodeState, MixerState
from loglinear.models.configuration import LogLinearConfig
from loglinear.models.history import History, Seen
from loglinear.ops.state import constants
from loglinear.ops.validation import check_rows, whole_number


class LinearStateLayer(CacheLayerMixin):
    """The cache of one mixer: its `FenwickState` and the last inputs of its convolution.

    The first tokens allocate its memory, which then stays in place and carries no gradients. Each row has its own
    position (`state.decode.fenwick.position`), without padding. `columns` counts the columns of the padded batch, by
    which `generate` slices its inputs; a static cache holds it on the device.
    """

    is_croppable = False
    supports_early_init = False

    def __init__(self, static: bool = False) -> None:
        super().__init__()
        self.is_compileable = static
        self.state: MixerDecodeState | None = None
        self.columns: int | Tensor = 0

    @torch.compiler.disable  # a graph's memory would be kept here, and its next replay overwrites it
    def store(self, state: MixerState | None, new_columns: int) -> None:
        """Store the state after new tokens that were no single step (None: all of them were padding)."""
        if state is not None and self.state is not None:
            self.state.copy_(state)
        elif state is not None:
            self.state = MixerDecodeState.of(state)
            if self.is_compileable:
                with constants():
                    self.columns = torch.tensor(self.columns, device=state.conv.device)
                for part in (*self.state.tensors, self.columns):
                    torch._dynamo.mark_static_address(part)
        self.advance(new_columns)

    def advance(self, new_columns: int) -> None:
        """Count new columns."""
        if isinstance(self.columns, Tensor):
            self.columns.add_(new_columns)
        else:
            self.columns += new_columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a linear layer keeps no keys and values; use LinearStateLayer.store")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a linear layer keeps no keys and values; use LinearStateLayer.store")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns  # type: ignore[return-value]  # transformers' static layers return a tensor too

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        if self.is_compileable and self.state is not None:  # graphs point at this memory
            for part in self.state.tensors:
                part.zero_()
            self.columns *= 0
        else:
            self.state, self.columns = None, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.state is not None:
            for part in self.state.tensors:
                part.copy_(part.index_select(0, beam_idx.to(part.device)))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("the state of a linear layer cannot go back: start with a new cache")

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.index_select(indices.to(self.state.conv.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.conv.shape[0], device=self.state.conv.device)
            self.state = self.state.index_select(rows.repeat_interleave(repeats))

    @property
    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes


class KeyValueLayer(DynamicLayer):
    """The keys and values of one full-attention layer; they grow with the sequence and carry no gradients."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = keys.detach(), values.detach()
        return keys, values

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes


class StaticKeyValueLayer(StaticLayer):
    """The keys and values of one full-attention layer in memory for a fixed number of columns."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        with constants():
            self.cumulative_length = self.cumulative_length.clone()
            super().lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        kept = super().update(key_states.detach(), value_states.detach(), *args, **kwargs)
        if not torch.is_grad_enabled():
            return kept
        # Later updates change this memory, but a backward pass needs these values, the new ones with gradients.
        time = key_states.shape[2]
        columns = self.cumulative_length - time + torch.arange(time, device=self.device)
        keys, values = (x.index_copy(2, columns, new) for x, new in zip(kept, (key_states, value_states), strict=True))
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            with constants():
                self.keys, self.values = (x.index_select(0, indices.to(x.device)) for x in (self.keys, self.values))
            self.batch_size = len(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes


class LogLinearCache(Cache, Seen):
    """The cache of `LogLinearModel`: `layers[i]` belongs to layer i.

    No layer keeps gradients: a forward pass that continues from a cache treats the past as constant.

    `real` [B, S] tells the full-attention layers which columns are tokens and which are padding (None: no padding so
    far), so a continuation needs no attention mask. The mixers' states contain no padding. `history` recognises a mask
    or tokens that differ from those that the cache has seen. A call that raises after it has begun to change the cache,
    for instance for lack of memory, leaves it unusable until `reset`. A compiled graph does not notice that.

    Args:
        config: The model's configuration.
        max_cache_len: The largest number of columns (`generate` with cache_implementation="static"), or None for a
            cache that grows. With a number, full-attention layers are allocated once, and no part of the cache is a
            Python number. So torch.compile and CUDA graphs can capture a step. Linear layers have no such limit.
    """

    def __init__(self, config: LogLinearConfig, max_cache_len: int | None = None) -> None:
        assert config.layer_types is not None
        layers: list[Any] = []
        for layer_type in config.layer_types:
            if layer_type == "linear_attention":
                layers.append(LinearStateLayer(static=max_cache_len is not None))
            else:
                layers.append(KeyValueLayer() if max_cache_len is None else StaticKeyValueLayer(max_cache_len))
        super().__init__(layers=layers)
        self.columns_limit = max_cache_len
        self.real: Tensor | None = None
        self.history = History(static=max_cache_len is not None)
        self.is_whole = True

    @property
    def has_states(self) -> bool:
        """True if all linear layers have seen a token."""
        return all(layer.state is not None for layer in self.layers if isinstance(layer, LinearStateLayer))

    @property
    def nbytes(self) -> int:
        """Bytes of all states, keys and values."""
        kinds = (LinearStateLayer, KeyValueLayer, StaticKeyValueLayer)
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, kinds))

    def extend_real(self, real_BT: Tensor | None, rows: int, time: int, device: torch.device) -> Tensor | None:
        """Note which of T new columns are tokens (None: all) and return the same for all columns.

        Returns:
            [B, S + T], or [B, max_cache_len] of a static cache; None if there is no padding.

        Raises:
            ValueError: a static cache has no room for them (on a GPU the copy itself notices).
        """
        if real_BT is None and self.real is None and self.columns_limit is None:
            return None
        past = self.get_seq_length()
        limit, may_ask = self.columns_limit, device.type == "cpu" and not torch.compiler.is_compiling()
        if limit is not None and may_ask and int(past) + time > limit:
            raise ValueError(f"past_key_values has room for {limit} columns, got {int(past) + time}")
        now = torch.ones(rows, time, dtype=torch.bool, device=device) if real_BT is None else real_BT
        if self.columns_limit is not None:
            if self.real is None:
                with constants():
                    self.real = torch.zeros(rows, self.columns_limit, dtype=torch.bool, device=device)
                if not torch.compiler.is_compiling():
                    torch._dynamo.mark_static_address(self.real)
            return self.real.index_copy_(1, past + torch.arange(time, device=device), now)
        before = torch.ones(rows, past, dtype=torch.bool, device=device) if self.real is None else self.real[:, :past]
        self.real = torch.cat([before, now], dim=1)
        return self.real

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0:
            return
        self.require_whole()
        for layer in self.layers:  # linear layers refuse before any layer changes
            if isinstance(layer, LinearStateLayer):
                layer.crop(tokens_to_remove)
        with changing(self):
            super().crop(tokens_to_remove)
            self.history.forget()
            if self.real is not None:
                self.real = self.real[:, : self.get_seq_length()]

    def reset(self) -> None:
        with changing(self):
            super().reset()
            self.history.reset()
            if self.real is not None and self.columns_limit is not None:
                self.real.zero_()
            else:
                self.real = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        rows = self.rows
        if rows is None:
            return
        self.require_whole()
        check_rows("beam_idx", beam_idx, rows)
        if len(beam_idx) != rows:
            raise ValueError(f"beam_idx must have one number for each of {rows} rows, got {len(beam_idx)}")
        with changing(self):
            super().reorder_cache(beam_idx)
            self.history.reorder(beam_idx)
            if self.real is not None:
                reordered = self.real.index_select(0, beam_idx.to(self.real.device))
                self.real = reordered if self.columns_limit is None else self.real.copy_(reordered)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.rows is None:
            return
        self.require_whole()
        check_rows("indices", indices, self.rows)
        with changing(self):
            super().batch_select_indices(indices)
            self.history.index_select(indices)
            if self.real is not None:
                self.real = self.real[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        repeats = whole_number("repeats", repeats)
        self.require_whole()
        with changing(self):
            super().batch_repeat_interleave(repeats)
            self.history.repeat_interleave(repeats)
            if self.real is not None:
                self.real = self.real.repeat_interleave(repeats, dim=0)


@contextmanager
def changing(cache: LogLinearCache | None) -> Iterator[None]:
    """Enter a context that changes a cache; an error inside it leaves the cache marked as not whole."""
    if cache is not None:
        cache.is_whole = False
    yield
    if cache is not None:
        cache.is_whole = True
