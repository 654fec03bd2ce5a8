# G groups, H heads, K key, V value, S sequences, W kernel
"""The states of a mixer: one that carries gradients, and one for decoding in place."""

from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.ops import DecodeState, FenwickState
from loglinear.ops.state import constants


class MixerState(NamedTuple):
    """The state of a mixer. It carries gradients, its size does not grow, and every row has its own position."""

    conv: Tensor
    """[S, W-1, 2 G K + H V] The last inputs of the convolution."""
    fenwick: FenwickState
    """The state of the operator."""
    sums: FenwickState | None = None
    """The sums of keys that a routed read scores; None without routing."""


class MixerDecodeState(NamedTuple):
    """A `MixerState` for decoding: `Mixer.step` changes its memory in place. It carries no gradients."""

    conv: Tensor
    """[S, W-1, 2 G K + H V] The last inputs of the convolution."""
    decode: DecodeState
    """The state of the operator."""
    sums: DecodeState | None = None
    """The sums of keys that a routed read scores; None without routing."""

    @classmethod
    def of(cls, state: MixerState) -> "MixerDecodeState":
        """Return a copy of a state without gradients; ValueError unless it is a `MixerState`."""
        if not isinstance(state, MixerState):
            raise ValueError(f"state must be a MixerState, got {type(state).__name__}")
        with constants():
            sums = None if state.sums is None else DecodeState.of(state.sums)
            return cls(state.conv.clone(memory_format=torch.contiguous_format), DecodeState.of(state.fenwick), sums)

    @torch.no_grad()
    def copy_(self, state: MixerState) -> None:
        """Copy the contents of another state into this one's memory; ValueError if the sizes differ."""
        if state.conv.shape != self.conv.shape:
            raise ValueError(f"state.conv must have shape {list(self.conv.shape)}, got {list(state.conv.shape)}")
        check_sums(state, self.sums is not None)
        self.decode.copy_(state.fenwick)
        if self.sums is not None and state.sums is not None:
            self.sums.copy_(state.sums)
        self.conv.copy_(state.conv)

    def state(self) -> MixerState:
        """Return the state from which sequences continue with more than one token.

        It shares this memory. `conv` is a copy if gradients are enabled: later steps would change what is saved for
        backward. The operator copies its own part.
        """
        sums = None if self.sums is None else self.sums.fenwick
        return MixerState(self.conv.clone() if torch.is_grad_enabled() else self.conv, self.decode.fenwick, sums)

    @property
    def tensors(self) -> list[Tensor]:
        """All parts that are tensors."""
        sums = [] if self.sums is None else self.sums.fenwick.tensors
        parts = (self.conv, *self.decode.fenwick.tensors, self.decode.inverse, *sums)
        return [part for part in parts if part is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.tensors)

    def index_select(self, rows: Tensor) -> "MixerDecodeState":
        """Return the state of these rows [n], in their order, in new memory; ValueError for an unknown row."""
        with constants():
            decode = self.decode.index_select(rows)  # checks the rows
            sums = None if self.sums is None else self.sums.index_select(rows)
            return MixerDecodeState(self.conv.index_select(0, rows), decode, sums)

    def first_rows(self, rows: int) -> "MixerDecodeState":
        """Return the first rows of a state, in the same memory."""
        with constants():
            sums = None if self.sums is None else _first_rows(self.sums, rows)
            return MixerDecodeState(self.conv[:rows], _first_rows(self.decode, rows), sums)


def _first_rows(state: DecodeState, rows: int) -> DecodeState:
    inverse = None if state.inverse is None else state.inverse[:rows]
    return DecodeState(state.fenwick.with_tensors(part[:rows] for part in state.fenwick.tensors), inverse)


def check_sums(state: MixerState | MixerDecodeState, routed: bool) -> None:
    """Raise ValueError unless a state has sums of keys exactly if its mixer has a routed read."""
    if (state.sums is not None) != routed:
        needs, has = ("sums", "none") if routed else ("no sums", "some")
        raise ValueError(f"state must have {needs}, as a mixer {'with' if routed else 'without'} routing, got {has}")
