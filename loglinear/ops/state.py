"""What a sequence leaves behind: enough to go on at any position, in pieces of any length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.fenwick import num_blocks
from loglinear.kernels.torch import chunk_inverse


@contextmanager
def constants() -> Iterator[None]:
    """Tensors made in here carry no gradients and may be changed in place and saved for a backward anywhere later.

    `torch.inference_mode(False)` alone turns gradients on, also inside `torch.no_grad()`.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


class FenwickState(NamedTuple):
    """The raw tokens of the unfinished chunk and the block states of the finished ones.

    One row per sequence; rows may stand at different positions. With N rows, C chunk_size, L levels:

        position   [N] int64          tokens consumed so far
        blocks     [N, M, H, K, V]    block m covers 2**m chunks, transported to the start of the unfinished chunk;
                                      zero where bit m of position // C is not set. The last one holds the whole
                                      older prefix. M = max(1, L - 1 - log2(C)).
        k          [N, C, G, K]       the unfinished chunk's tokens, zero from row position % C on
        v          [N, C, H, V]
        log_decay  [N, C, H]
        beta       [N, C, H]          None for the scalar gate

    The size depends on L and C alone, never on the position. Everything but `position` is float32 (float64 for
    float64 inputs) and carries gradients. A state that decoding leaves behind may have other finite numbers in its rows
    from position % C on; they count for nothing.
    """

    position: Tensor
    blocks: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None

    @classmethod
    def zeros(
        cls,
        rows: int,
        *,
        num_levels: int,
        chunk_size: int,
        groups: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        delta_rule: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> FenwickState:
        """The state of sequences that have not begun."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        return cls(
            position=torch.zeros(rows, dtype=torch.int64, device=device),
            blocks=zeros(num_blocks(num_levels, chunk_size), heads, key_dim, value_dim),
            k=zeros(chunk_size, groups, key_dim),
            v=zeros(chunk_size, heads, value_dim),
            log_decay=zeros(chunk_size, heads),
            beta=zeros(chunk_size, heads) if delta_rule else None,
        )

    @property
    def chunk_size(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self if part is not None)

    def index_select(self, rows: Tensor) -> FenwickState:
        """The state of other rows, in the order given (beam search)."""
        return FenwickState._make(None if part is None else part.index_select(0, rows) for part in self)

    def detach(self) -> FenwickState:
        return FenwickState._make(None if part is None else part.detach() for part in self)


class DecodeState(NamedTuple):
    """A `FenwickState` in memory of its own, which the one-token steps change in place: allocated once, never moved.

    It carries no gradients: what continues from it treats the past as constant.

    `fenwick` can be handed to the operators as initial_state at any time, to continue with more than one token.
    With N rows, C chunk_size:

        inverse   [N, C, H, C]   the delta rule's (I + tril(diag(beta) K K^T dec, -1))^-1 of the unfinished chunk, by
                                 its rows; None for the scalar gate
    """

    fenwick: FenwickState
    inverse: Tensor | None

    @classmethod
    def zeros(cls, rows: int, **sizes: Any) -> DecodeState:
        """The state of sequences that have not begun; sizes as in `FenwickState.zeros`."""
        with constants():
            fenwick = FenwickState.zeros(rows, **sizes)
            if fenwick.beta is None:
                return cls(fenwick, None)
            return cls(fenwick, fenwick.beta.new_zeros(*fenwick.beta.shape, fenwick.chunk_size))

    @classmethod
    def of(cls, state: FenwickState) -> DecodeState:
        """A copy of a state without its gradients, which lives in no inference mode, even if made in one."""
        _require_fenwick(state)
        with constants():
            fenwick = FenwickState._make(
                None if x is None else x.clone(memory_format=torch.contiguous_format) for x in state
            )
            fenwick = fenwick._replace(position=fenwick.position.long())
            return cls(fenwick, _inverse(fenwick))

    @torch.no_grad()
    def copy_(self, state: FenwickState) -> DecodeState:
        """The contents of another state of the same sizes, in the memory of this one; ValueError if they differ."""
        _require_fenwick(state)
        for name, own, other in zip(FenwickState._fields, self.fenwick, state, strict=True):
            sizes = [None if x is None else list(x.shape) for x in (own, other)]
            if sizes[0] != sizes[1]:
                raise ValueError(f"a state with {name} {sizes[1]} does not fit into one that was made for {sizes[0]}")
        for own, other in zip(self.fenwick, state, strict=True):
            if own is not None and other is not None:
                own.copy_(other)
        if self.inverse is not None:
            inverse = _inverse(self.fenwick)
            assert inverse is not None
            self.inverse.copy_(inverse)
        return self

    @property
    def nbytes(self) -> int:
        return self.fenwick.nbytes + (0 if self.inverse is None else self.inverse.nbytes)

    def index_select(self, rows: Tensor) -> DecodeState:
        """The state of other rows, in the order given (beam search), in memory of its own."""
        with constants():
            fenwick = self.fenwick.index_select(rows)
            return DecodeState(fenwick, None if self.inverse is None else self.inverse.index_select(0, rows))


def for_backward(state: FenwickState) -> FenwickState:
    """The state; a copy where it was made in inference mode and a backward may need it, which could not save it."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return state
    return FenwickState._make(x.clone() if x is not None and x.is_inference() else x for x in state)


def check_family(name: str, state: FenwickState, delta_rule: bool) -> None:
    """ValueError where a state of one operator is given to the other."""
    if (state.beta is not None) != delta_rule:
        kind = "the delta rule (beta)" if state.beta is not None else "a scalar gate (no beta)"
        raise ValueError(f"{name} is one of {kind} and cannot continue the other operator")


def _require_fenwick(state: FenwickState) -> None:
    if not isinstance(state, FenwickState):
        kind = type(state).__name__
        raise ValueError(
            f"state must be a FenwickState, an operator's final_state (output_final_state=True), got {kind}"
        )


def _inverse(state: FenwickState) -> Tensor | None:
    if state.beta is None:
        return None
    held = torch.arange(state.chunk_size, device=state.k.device) < (state.position % state.chunk_size)[:, None]
    log_decay, beta = (torch.where(held[..., None], x, 0.0) for x in (state.log_decay, state.beta))
    with torch.autocast(state.k.device.type, enabled=False):
        return chunk_inverse(state.k, beta, log_decay).contiguous()
