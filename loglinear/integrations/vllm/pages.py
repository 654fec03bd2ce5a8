# P pages, N rows, F numbers of a page, C chunk, M blocks
"""The pages in which vLLM keeps the states of sequences: one row of float32 numbers for each linear layer."""

from __future__ import annotations

from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loglinear.integrations.vllm.batch import Slab
from loglinear.layers import Mixer, MixerDecodeState
from loglinear.models import LogLinearConfig


class Part(NamedTuple):
    """One tensor of a `MixerDecodeState`, as a page stores it."""

    shape: tuple[int, ...]
    """Its shape in one row."""
    kind: Literal["window", "blocks", "tokens"]
    """A step changes all of "window", one token of "tokens", and "blocks" when a chunk is full."""
    chunk: int = 1
    """C, the tokens of that chunk."""


class PageLayout:
    """The parts of a page in their order.

    Positions are not stored, because vLLM knows them. Nor are blocks that no sequence of `max_model_len` tokens has.

    Args:
        mixer: A layer, whose parameters may lie on the meta device.
        max_model_len: The most tokens of a sequence.
    """

    def __init__(self, mixer: Mixer, max_model_len: int) -> None:
        x = torch.empty(1, 1, 1, device="meta")
        conv, fenwick, sums = mixer.empty_state(1, x)
        L = min(mixer.num_levels, mixer.partition.num_columns(max_model_len))
        self.parts = [Part(tuple(conv.shape[1:]), "window")]
        for state in (fenwick, sums):
            if state is None:
                continue
            C = state.chunk_size
            blocks = (mixer.partition.num_blocks(L, C), *state.blocks.shape[2:])
            self.parts.append(Part(blocks, "blocks", C))
            tokens = [state.k, state.v, state.log_decay, *([] if state.beta is None else [state.beta])]
            self.parts += [Part(tuple(part.shape[1:]), "tokens", C) for part in tokens]
            if state.beta is not None:
                self.parts.append(Part((*state.beta.shape[1:], C), "tokens", C))  # DecodeState.inverse
        self.sizes = [prod(part.shape) for part in self.parts]

    @classmethod
    def of(cls, config: LogLinearConfig, max_model_len: int) -> PageLayout:
        """Return the layout of a configuration's linear layers, without memory for a layer."""
        with torch.device("meta"):
            return cls(Mixer(config.hidden_size, config.heads, **config.mixer_options), max_model_len)

    @property
    def numbers(self) -> int:
        """F, the numbers of a page."""
        return sum(self.sizes)

    def views(self, pages: Tensor) -> list[Tensor]:
        """Return the parts of all pages [P, F], each [P, *shape] in the same memory."""
        split = pages.split(self.sizes, dim=1)
        return [part.unflatten(1, own.shape) for part, own in zip(split, self.parts, strict=True)]

    def read(self, pages: Tensor, slab: Slab, state: MixerDecodeState) -> None:
        """Copy the pages of a slab's rows into a state of N rows; new sequences have zeros."""
        for part, own, mine in zip(self.views(pages), self.parts, stored_tensors(state), strict=True):
            into = mine[:, : own.shape[0]] if own.kind == "blocks" else mine
            into.copy_(part.index_select(0, slab.pages))
            if slab.new is not None:
                mine[slab.new] = 0.0
        for decode in (state.decode, state.sums):
            if decode is not None:
                decode.fenwick.position.copy_(slab.position)

    def write(self, pages: Tensor, slab: Slab, state: MixerDecodeState) -> None:
        """Copy a state of N rows into the pages of a slab's rows."""
        for part, own, mine in zip(self.views(pages), self.parts, stored_tensors(state), strict=True):
            part[slab.pages] = (mine[:, : own.shape[0]] if own.kind == "blocks" else mine).to(part.dtype)

    def write_step(self, pages: Tensor, slab: Slab, state: MixerDecodeState) -> None:
        """Copy the numbers of a state that a step changed. New sequences are copied whole."""
        row = torch.arange(len(slab.pages), device=pages.device)
        for part, own, mine in zip(self.views(pages), self.parts, stored_tensors(state), strict=True):
            if own.kind == "window":
                part[slab.pages] = mine.to(part.dtype)  # float32 holds the 16-bit numbers exactly
                continue
            whole = slab.new
            if own.kind == "blocks":
                whole = slab.changed(own.chunk)
            else:
                place = slab.position % own.chunk
                part[slab.pages, place] = mine[row, place]
            if whole is not None:
                part[slab.pages[whole]] = mine[whole][:, : own.shape[0]]


class StepMemory:
    """The memory of one `MixerDecodeState`, which all layers use in turn."""

    def __init__(self) -> None:
        self._all: MixerDecodeState | None = None
        self._first: dict[int, MixerDecodeState] = {}

    def rows(self, mixer: Mixer, count: int, x: Tensor) -> MixerDecodeState:
        """Return a state of `count` rows for inputs like x, with arbitrary contents. `first` is 0."""
        if self._all is None or len(self._all.conv) < count:
            self._all = MixerDecodeState.of(mixer.empty_state(count, x))
            self._first = {}
        if count not in self._first:
            self._first[count] = self._all.first_rows(count)
        return self._first[count]


def stored_tensors(state: MixerDecodeState) -> list[Tensor]:
    """Return the tensors of a state that a page stores, in the order of `PageLayout.parts`."""
    found = [state.conv]
    for decode in (state.decode, state.sums):
        if decode is not None:
            s = decode.fenwick
            found += [x for x in (s.blocks, s.k, s.v, s.log_decay, s.beta, decode.inverse) if x is not None]
    return found
