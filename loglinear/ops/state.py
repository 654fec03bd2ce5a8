"""The states of sequences: everything that a sequence needs to continue at any position, in pieces of any length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.kernels.torch import chunk_inverse
from loglinear.kernels.unchanging import is_unchanging, is_zero, once, unchanging
from loglinear.ops.validation import (
    INTEGERS,
    INVERSE,
    WIDE_FLOATS,
    Sizes,
    check_family,
    check_gate,
    check_owned,
    check_partition,
    check_rows,
    check_same_partition,
    check_state,
    check_tensor,
    check_tree_positions,
    chunk_length,
    flag,
    whole_number,
)
from loglinear.partition import FENWICK, LARGEST_CHUNK, Partition

torch.utils._pytree.register_constant(Partition)  # graphs return states, which are pytrees


@contextmanager
def constants() -> Iterator[None]:
    """Enter a context for new tensors that carry no gradients but may change in place and be saved for backward."""
    # torch.inference_mode(False) alone turns gradients on, even inside torch.no_grad().
    with torch.inference_mode(False), torch.no_grad():
        yield


class FenwickState(NamedTuple):
    """The state of sequences: raw tokens of the unfinished chunk and block states of the finished chunks.

    Each sequence has one row and its own position. With N rows, C chunk_size, L levels:

        position   [N] int64          tokens consumed so far
        blocks     [N, M, H, K, V]    block m covers 2**m chunks, decayed to the start of the unfinished chunk;
                                      zero if bit m of position // C is 0. The last block is the whole older
                                      prefix, zero if there is none. M = max(1, L - 1 - log2(C)). With another
                                      partition block m has column M - L + m of level_scales.
        k          [N, C, G, K]       the unfinished chunk's tokens, zero from row position % C on
        v          [N, C, H, V]
        log_decay  [N, C, H]          [N, C, H, K] for a diagonal gate
        beta       [N, C, H]          None without the delta rule
        partition                     the `Partition` of the past; None for the Fenwick partition
        first      [N] int64          the position of the first token. The tokens of buckets count from here; see
                                      `loglinear.ops.bucket_tokens`. None: 0, as in the states of earlier versions

    The size depends on L and C alone, never on the position. `position` and `first` are integers. All other tensors are
    float32 (float64 for float64 inputs) and carry gradients. The operators ignore any finite number in place of these
    zeros; decoding leaves such numbers behind.
    """

    position: Tensor
    blocks: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None
    partition: Partition | None = None
    first: Tensor | None = None

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
        diagonal_gate: bool = False,
        position: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        partition: Partition = FENWICK,
    ) -> FenwickState:
        """Return the state of sequences that have no token yet.

        A sequence of T tokens that starts from this state at position p has the partition of positions p to p + T - 1.
        An operator's outputs are those after p tokens that write nothing. A bucket before p holds no token.

        Args:
            rows: N, the number of sequences.
            num_levels: L, at most 64.
            chunk_size: C, a power of two up to 4096; the size of block next to it with another partition.
            groups: G, the query/key groups.
            heads: H, the value heads, a multiple of G.
            key_dim: K.
            value_dim: V.
            delta_rule: True for the delta rule (with beta), False without it.
            diagonal_gate: True for a log_decay of each channel of the keys, False for one of each head.
            position: [N] integers, the position at which each sequence starts; the state has a copy. None: 0.
            dtype: float32 or float64.
            device: The device of all parts.
            partition: The partition of the past, as in the operators.

        Raises:
            ValueError: A size or dtype that no state has; the message names it.
        """
        sizes = dict(rows=rows, groups=groups, heads=heads, key_dim=key_dim, value_dim=value_dim)
        rows, groups, heads, key_dim, value_dim = (whole_number(*size) for size in sizes.items())
        check_partition("partition", partition)
        num_levels = whole_number("num_levels", num_levels, most=partition.num_columns(2**63))
        chunk_size = partition.chunk_near(chunk_length("chunk_size", chunk_size), LARGEST_CHUNK)
        if heads % groups:
            raise ValueError(f"heads must be a multiple of groups = {groups}, got {heads}")
        if dtype not in WIDE_FLOATS:
            raise ValueError(f"dtype must be float32 or float64, got {dtype}")
        flag("delta_rule", delta_rule)
        flag("diagonal_gate", diagonal_gate)

        if position is None:
            position = torch.zeros(rows, dtype=torch.int64, device=device)
        else:
            check_tensor("position", position, "N", {"N": rows}, position.device, INTEGERS)
            check_tree_positions("position", position)
            position = position.to(device, torch.int64, copy=True)  # steps change it in place

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        return cls(
            position=position,
            blocks=zeros(partition.num_blocks(num_levels, chunk_size), heads, key_dim, value_dim),
            k=zeros(chunk_size, groups, key_dim),
            v=zeros(chunk_size, heads, value_dim),
            log_decay=zeros(chunk_size, heads, *([key_dim] if diagonal_gate else [])),
            beta=zeros(chunk_size, heads) if delta_rule else None,
            partition=None if partition == FENWICK else partition,
            first=position.clone(),
        )

    @property
    def chunk_size(self) -> int:
        """C, tokens per chunk."""
        return self.k.shape[1]

    @property
    def is_diagonal(self) -> bool:
        """True for a diagonal gate, False for a scalar one."""
        return self.log_decay.dim() == 4

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """All parts that are tensors, in their order."""
        return [part for part in self if isinstance(part, Tensor)]

    def with_tensors(self, tensors: Iterable[Tensor]) -> FenwickState:
        """Return this state with other tensors in place of `self.tensors`."""
        given = list(tensors)
        return FenwickState._make([given.pop(0) if isinstance(part, Tensor) else part for part in self])

    def index_select(self, rows: Tensor) -> FenwickState:
        """Return the state of these rows [n], in their order (beam search).

        Raises:
            ValueError: `rows` holds a number that is no row of the state.
        """
        check_rows("rows", rows, len(self.position), self.position.device)
        return self.with_tensors(part.index_select(0, rows) for part in self.tensors)

    def detach(self) -> FenwickState:
        """Return the same state without gradients."""
        return self.with_tensors(part.detach() for part in self.tensors)


@dataclass(frozen=True)
class DecodeState:
    """A `FenwickState` for decoding: its memory is allocated once, and the one-token steps change it in place.

    It carries no gradients, so a backward pass treats the past as constant. `fenwick` is a valid initial_state of the
    operators at any time, to continue with more than one token. An operator whose inputs require gradients works on a
    copy, so the state may change before the backward pass. An operator inside torch.utils.checkpoint reads its state
    again in the backward pass, so step that state only afterwards. With N rows, C chunk_size:

        inverse   [N, C, H, C]   the delta rule's (I + tril(diag(beta) K K^T dec, -1))^-1 of the unfinished chunk, by
                                 its rows; None without the delta rule

    Raises:
        ValueError: The parts do not fit each other or share memory; one line names the part.
    """

    fenwick: FenwickState
    inverse: Tensor | None

    def __post_init__(self) -> None:
        sizes: Sizes = {}
        fenwick = checked_state("fenwick", self.fenwick, sizes)
        parts = {f"fenwick.{name}": x for name, x in self.fenwick._asdict().items() if isinstance(x, Tensor)}
        for name in ("position", "first") if fenwick is not self.fenwick else ():
            x = getattr(self.fenwick, name)
            if x is None or x.dtype != torch.int64:
                raise ValueError(f"fenwick.{name} must hold int64, got {None if x is None else x.dtype}")
        if (self.inverse is None) != (fenwick.beta is None):
            needs = "None if fenwick has no" if fenwick.beta is None else "a tensor if fenwick has a"
            raise ValueError(f"inverse must be {needs} beta: make the state with DecodeState.of")
        if self.inverse is not None:
            parts["inverse"] = self.inverse
            check_tensor("inverse", self.inverse, INVERSE, sizes, fenwick.k.device, WIDE_FLOATS)
            if self.inverse.dtype != fenwick.k.dtype:
                raise ValueError(f"inverse must hold {fenwick.k.dtype} as fenwick does, got {self.inverse.dtype}")
        check_owned(parts)

    def __setstate__(self, parts: dict[str, Any]) -> None:
        """Read a pickle; one of earlier versions has no first position."""
        vars(self).update(parts)
        if self.fenwick.first is None:
            with constants():
                vars(self)["fenwick"] = checked_state("fenwick", self.fenwick, {})

    @classmethod
    def zeros(cls, rows: int, **sizes: Any) -> DecodeState:
        """Return the state of `rows` sequences that have no token yet; sizes as in `FenwickState.zeros`."""
        with constants():
            fenwick = FenwickState.zeros(rows, **sizes)
            if fenwick.beta is None:
                return cls(fenwick, None)
            return cls(fenwick, fenwick.beta.new_zeros(*fenwick.beta.shape, fenwick.chunk_size))

    @classmethod
    def of(cls, state: FenwickState) -> DecodeState:
        """Return a copy of a state without gradients, usable outside inference mode even if made inside it.

        Raises:
            ValueError: `state` is no FenwickState, or its parts do not fit each other.
        """
        state = checked_state("state", state, {})
        with constants():
            fenwick = state.with_tensors(x.clone(memory_format=torch.contiguous_format) for x in state.tensors)
            return cls(fenwick, _inverse(fenwick))

    @torch.no_grad()
    def copy_(self, state: FenwickState) -> DecodeState:
        """Copy the contents of another state into this one's memory and return this state.

        Raises:
            ValueError: The sizes, dtype or device of `state` differ.
        """
        own = self.fenwick
        partition = own.partition or FENWICK
        state = checked_state(
            "state", state, self.sizes(), own.k.device, delta_rule=own.beta is not None, partition=partition
        )
        check_gate("state", state, own.is_diagonal)
        if state.k.dtype != own.k.dtype:
            raise ValueError(f"state must hold {own.k.dtype}, as the state that it is copied into, got {state.k.dtype}")
        for mine, other in zip(own.tensors, state.tensors, strict=True):
            mine.copy_(other)
        if self.inverse is not None:
            inverse = _inverse(own)
            assert inverse is not None
            self.inverse.copy_(inverse)
        return self

    def sizes(self) -> Sizes:
        """Return the size of every axis, by its letter in `loglinear.ops.validation`."""
        (N, M, H, K, V), (C, G) = self.fenwick.blocks.shape, self.fenwick.k.shape[1:3]
        return {"N": N, "M": M, "H": H, "K": K, "V": V, "C": C, "G": G}

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.fenwick.nbytes + (0 if self.inverse is None else self.inverse.nbytes)

    def index_select(self, rows: Tensor) -> DecodeState:
        """Return the state of these rows [n], in their order (beam search), in new memory.

        Raises:
            ValueError: `rows` holds a number that is no row of the state.
        """
        with constants():
            fenwick = self.fenwick.index_select(rows)
            return DecodeState(fenwick, None if self.inverse is None else self.inverse.index_select(0, rows))


def checked_state(
    name: str,
    state: Any,
    sizes: Sizes,
    device: torch.device | None = None,
    *,
    delta_rule: bool | None = None,
    partition: Partition | None = None,
) -> FenwickState:
    """Return the state with an int64 position and first if its parts fit each other and the other arguments.

    A first of None becomes 0. delta_rule and partition of None: either operator, any partition.

    Raises:
        ValueError: `state` is no FenwickState, or a part does not fit; one line names it.
    """
    if not isinstance(state, FenwickState):
        kind = type(state).__name__
        raise ValueError(
            f"{name} must be a FenwickState, an operator's final_state (output_final_state=True), got {kind}"
        )
    if delta_rule is not None:
        check_family(name, state.beta is not None, delta_rule)
    if state.partition is not None:
        check_partition(f"{name}.partition", state.partition)
    made_with = state.partition or FENWICK
    if partition is not None:
        check_same_partition(name, made_with, partition)
    check_state(name, state, sizes, device)
    made_with.check_chunk_size(sizes["C"])
    first = torch.zeros_like(state.position) if state.first is None else state.first
    if first is state.first and first.dtype == state.position.dtype == torch.int64:
        return state
    # A graph of torch 2.11 loses the last fields of a state that `_replace` made.
    return FenwickState(state.position.long(), *state[1:-1], first.long())


def empty_state(rows: int, *, position: Tensor | None, **sizes: Any) -> FenwickState:
    """Return `FenwickState.zeros(rows, position=position, **sizes)`, at an `unchanging` position once for all layers.

    Nobody may then change any part of it, and `is_empty` is True.
    """
    if position is None or not is_unchanging(position):
        return FenwickState.zeros(rows, position=position, **sizes)

    def make() -> FenwickState:
        state = FenwickState.zeros(rows, position=position, **sizes)
        return state.with_tensors([position, *(unchanging(x, is_zero=True) for x in state.tensors[1:-1]), position])

    return once(make, ("state", rows, *sorted(sizes.items())), position)


def is_empty(state: FenwickState) -> bool:
    """True if the state is known to have no token, as one of `empty_state`; False may be either."""
    return all(is_zero(x) for x in state.tensors[1:-1])  # without position and first


def for_backward(state: FenwickState, operands: Iterable[Tensor | None]) -> FenwickState:
    """Return the state, or a copy of a constant state that a backward pass with these operands may save.

    The memory of a `DecodeState` changes before that backward pass, and a tensor of inference mode cannot be saved.
    """
    is_saved = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    if not is_saved or any(x.requires_grad for x in state.tensors):
        return state
    return state.with_tensors(x if is_unchanging(x) else x.clone() for x in state.tensors)


def _inverse(state: FenwickState) -> Tensor | None:
    """Return `DecodeState.inverse` of a state's unfinished chunk."""
    if state.beta is None:
        return None
    is_buffered = torch.arange(state.chunk_size, device=state.k.device) < (state.position % state.chunk_size)[:, None]
    log_decay, beta = (
        torch.where(is_buffered.view(*is_buffered.shape, *[1] * (x.dim() - 2)), x, 0.0)
        for x in (state.log_decay, state.beta)
    )
    with torch.autocast(state.k.device.type, enabled=False):
        return chunk_inverse(state.k, beta, log_decay).contiguous()
