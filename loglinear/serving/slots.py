# N rows in use, R rows, T time, D hidden size, G key/value heads, K head width, S columns so far, V vocabulary
"""The rows of a batch, each at its own position. A sequence joins as a copy, and leaves without a trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loglinear.layers import AttentionContext, MixerDecodeState, rotary_tables
from loglinear.models import LogLinearCache, LogLinearForCausalLM
from loglinear.models.inputs import TokenLayout

FEWEST_COLUMNS = 256  # of the first keys and values


class Slots:
    """R rows of states, keys and values. The first N rows are in use.

    A linear layer's memory has a fixed size. Keys and values of full attention grow with the longest sequence, and
    shrink when it has left.

    Args:
        model: A model in evaluation mode.
        count: R, the most sequences at once.
    """

    def __init__(self, model: LogLinearForCausalLM, count: int) -> None:
        assert model.config.layer_types is not None
        self.model, self.count = model, count
        self.lengths: list[int] = []  # tokens that each row has read
        x = model.model.embed_tokens.weight.detach()
        self.layers: list[SlotStates | SlotKeyValues] = [
            SlotStates(block.mixer.empty_state(count, x))
            if layer_type == "linear_attention"
            else SlotKeyValues(model.config, count, x)
            for block, layer_type in zip(model.model.layers, model.config.layer_types, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(part.nbytes for layer in self.layers for part in layer.tensors)

    def join(self, cache: LogLinearCache | None, length: int) -> None:
        """Copy a sequence of `length` tokens into the row behind those in use. None: no token has been read."""
        row = len(self)
        for index, layer in enumerate(self.layers):
            layer.write(row, None if cache is None else cache.layers[index], length)
        self._use([*self.lengths, length])

    def leave(self, row: int) -> None:
        """Free a row. The last row in use moves into its place."""
        last = len(self) - 1
        if row < last:
            for layer in self.layers:
                for part in layer.tensors:
                    part[row].copy_(part[last])
            self.lengths[row] = self.lengths[last]
        self._use(self.lengths[:last])

    def clear(self) -> None:
        """Free all rows."""
        self._use([])

    def copy_of(self, row: int) -> LogLinearCache:
        """Return a cache of one row's sequence."""
        cache = LogLinearCache(self.model.config)
        for mine, copy in zip(self.layers, cache.layers, strict=True):
            mine.read(row, copy, self.lengths[row])
        return cache

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Return the logits [N, V] after one more token [N] of each row."""
        x = self.model.model.embed_tokens(tokens[:, None])
        layout = TokenLayout(packing=None, attention=self._attention(x.device), is_step=True)
        for block, layer in zip(self.model.model.layers, self.layers, strict=True):
            x, _ = block(x, layout, past_key_values=layer)
        self.lengths = [length + 1 for length in self.lengths]
        return self.model.lm_head(self.model.model.norm(x))[:, 0]

    def _use(self, lengths: list[int]) -> None:
        self.lengths = lengths
        for layer in self.layers:
            layer.use(lengths)

    def _attention(self, device: torch.device) -> AttentionContext | None:
        """Return the inputs of full attention: each row is at its own column and sees those up to it."""
        stores = [layer for layer in self.layers if isinstance(layer, SlotKeyValues)]
        if not stores:
            return None
        columns = torch.tensor(self.lengths, device=device)
        for store in stores:
            store.columns, store.width = columns, max(self.lengths) + 1
        config = self.model.config
        cos, sin = rotary_tables(columns[:, None], config.attention_head_dim or 0, config.rope_theta)
        seen = torch.arange(max(self.lengths) + 1, device=device) <= columns[:, None]
        return AttentionContext(cos, sin, seen[:, None, None])


class SlotStates:
    """The states of one linear layer. `state` is that of the rows in use, in the same memory."""

    def __init__(self, empty: Any) -> None:
        self.memory = MixerDecodeState.of(empty)
        self.state = self.memory

    @property
    def tensors(self) -> list[Tensor]:
        return self.memory.tensors

    def use(self, lengths: list[int]) -> None:
        """Let steps change only the first rows, one for each entry of `lengths`."""
        if lengths:
            self.state = self.memory.first_rows(len(lengths))

    def write(self, row: int, layer: Any, length: int) -> None:
        """Copy a cache's layer into a row."""
        others = [None] * len(self.tensors) if layer is None else layer.state.tensors
        for mine, other in zip(self.tensors, others, strict=True):
            mine[row].zero_() if other is None else mine[row].copy_(other[0])

    def read(self, row: int, layer: Any, length: int) -> None:
        """Copy a row into a cache's layer."""
        layer.state = self.memory.index_select(torch.tensor([row], device=self.memory.conv.device))
        layer.columns = length

    def advance(self, new_columns: int) -> None:
        """Do nothing: `Slots` counts the tokens of each row."""


class SlotKeyValues:
    """The keys and values [R, G, S, K] of one full-attention layer. A step writes row n at column `columns[n]`."""

    def __init__(self, config: Any, count: int, like: Tensor) -> None:
        shape = (count, config.num_key_value_heads, FEWEST_COLUMNS, config.attention_head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.rows, self.width = 0, 0
        self.columns = torch.zeros(0, dtype=torch.int64)  # [N], set before each step

    @property
    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]

    def use(self, lengths: list[int]) -> None:
        """Use the first rows, and give memory back that only longer ones needed."""
        self.rows = len(lengths)
        needed = max([FEWEST_COLUMNS, *lengths])
        if 4 * needed < self.keys.shape[2]:
            self.keys, self.values = (part[:, :, : 2 * needed].clone() for part in self.tensors)

    def write(self, row: int, layer: Any, length: int) -> None:
        self._make_room(length)
        for mine, other in zip(self.tensors, () if layer is None else (layer.keys, layer.values), strict=False):
            mine[row, :, :length].copy_(other[0])
        for mine in self.tensors:  # a weight of 0 does not hide the NaN of a sequence that has left
            mine[row, :, length:].zero_()

    def read(self, row: int, layer: Any, length: int) -> None:
        layer.update(*(part[row : row + 1, :, :length].clone() for part in self.tensors))

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [N, G, 1, K], and return all [N, G, S, K]."""
        self._make_room(self.width)
        row = torch.arange(self.rows, device=self.keys.device)
        for mine, new in zip(self.tensors, (key_states, value_states), strict=True):
            mine[row, :, self.columns] = new[:, :, 0]
        return self.keys[: self.rows, :, : self.width], self.values[: self.rows, :, : self.width]

    def _make_room(self, columns: int) -> None:
        more = columns - self.keys.shape[2]
        if more > 0:
            more = max(more, self.keys.shape[2])
            self.keys, self.values = (torch.nn.functional.pad(part, (0, 0, 0, more)) for part in self.tensors)
