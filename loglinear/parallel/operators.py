"""Both operators on sequences that lie on several devices.

Every rank runs the operator on its own slice, from an empty tree at the position of the slice. The read of the past is
linear in the states, so the older slices add one term for each bucket c that holds tokens of theirs:

    o_t = local_t + sum_c lambda[t, c] * x_t^T S_c            x_t^T = scale * q_t^T P_t ... P_first

P_first, ..., P_t are the transitions of the slice's tokens up to t. The states S_c at the beginning of a slice follow
from each older slice's transition P and from its states S of the buckets that hold its tokens, oldest slice first:

    S_c = P S_c + sum of the slice's S that are in bucket c

One all-gather of every rank's (P, S) is all communication; the backward pass has one reduce-scatter of their gradients.
"""

# B batch, T time, h tokens of the first part, G groups, H heads, K key, V value, L levels, N sequences, C chunk
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from loglinear import ops
from loglinear.ops import FenwickState
from loglinear.ops.problem import MIN_LOG_DECAY, Problem, unit_length
from loglinear.ops.state import empty_state
from loglinear.ops.validation import flag
from loglinear.parallel.collectives import all_gather, joined
from loglinear.parallel.layouts import check_batch, most_pieces, older_pieces, on_device
from loglinear.parallel.pieces import Tree, pieces, runs
from loglinear.partition import FENWICK, Partition

if TYPE_CHECKING:
    from loglinear.parallel.slices import Part, Slices


def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    level_scales: Tensor,
    *,
    slices: Slices,
    scale: float = 1.0,
    chunk_size: int = 64,
    partition: Partition = FENWICK,
    impl: str = "auto",
) -> Tensor:
    """Return `loglinear.log_linear_attention` of whole sequences, for the tokens of this rank's slice.

    Every rank of the mesh dimension must call it, and must run the backward pass if one does. The slice costs one more
    matrix product [n, K] x [K, V] for each head and bucket with older slices' tokens, n tokens in the slice.

    Args:
        q: [B, n, G, K], the queries of this rank's tokens, as `slices.take` gives them; so are the other tensors.
        k: [B, n, G, K].
        v: [B, n, H, V].
        log_decay: [B, n, H], or None for no decay.
        level_scales: [B, n, H, L].
        slices: The slices of the sequences, made with a multiple of this operator's chunk.
        scale: The factor of q.
        chunk_size: Tokens per chunk, as in the operator.
        partition: The partition of the past, as in the operator.
        impl: The implementation of the slice's own part, as in the operator.

    Returns:
        [B, n, H, V] in v's dtype. The read of older slices is computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: An argument does not fit, as in the operator, or the slices do not fit it.
    """
    call = Problem(q, k, v, log_decay, None, level_scales, scale, None, False, None, chunk_size, partition)
    return _run(_Sliced(call.checked(delta_rule=False), slices, impl))


def log_linear_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    level_scales: Tensor,
    *,
    slices: Slices,
    scale: float = 1.0,
    l2_normalize: bool = False,
    chunk_size: int = 64,
    partition: Partition = FENWICK,
    impl: str = "auto",
) -> Tensor:
    """Return `loglinear.log_linear_delta_rule` of whole sequences, for the tokens of this rank's slice.

    As `log_linear_attention` of this module, with one cost more. The x_t of all tokens and the slice's P are the output
    and the final state of the linear delta rule (L = 1) that writes nothing and starts at the identity. A slice that
    continues a document runs it, with K value columns.

    Args:
        q: [B, n, G, K], the queries of this rank's tokens, as `slices.take` gives them; so are the other tensors.
        k: [B, n, G, K].
        v: [B, n, H, V].
        log_decay: [B, n, H], or None for no decay.
        beta: [B, n, H].
        level_scales: [B, n, H, L].
        slices: The slices of the sequences, made with a multiple of this operator's chunk.
        scale: The factor of q.
        l2_normalize: True to first scale q and k to length 1, as in the operator.
        chunk_size: Tokens per chunk, as in the operator.
        partition: The partition of the past, as in the operator.
        impl: The implementation of the slice's own part and of the linear delta rule.

    Returns:
        [B, n, H, V] in v's dtype.

    Raises:
        ValueError: An argument does not fit, as in the operator, or the slices do not fit it.
    """
    call = Problem(q, k, v, log_decay, beta, level_scales, scale, None, False, None, chunk_size, partition)
    call = call.checked(delta_rule=True)
    if flag("l2_normalize", l2_normalize):
        call = replace(call, q=unit_length(call.q), k=unit_length(call.k))
    return _run(_Sliced(call, slices, impl))


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "scalar_gate": log_linear_attention,
    "delta_rule": log_linear_delta_rule,
}


class Incoming(NamedTuple):
    """The way in which the tokens of a part see a state from before it."""

    x: Tensor
    """[B, h, G, K] (scalar gate, without the decay) or [B, h, H, K] (delta rule)."""
    decay: Tensor | None
    """[B, h, H] the decay since the part's beginning; None if x contains it."""
    transition: Tensor | None
    """P of the part, [N, H] (scalar gate) or [N, H, K, K] (delta rule); None if its document ends here."""


class _Sliced:
    """One call: the operands of a slice, the slices and the tree."""

    def __init__(self, call: Problem, slices: Slices, impl: str) -> None:
        check_batch(slices, call.q, call.chunk_size)
        self.call, self.slices, self.impl = call, slices, impl
        self.tree = Tree(call.partition, call.chunk_size, call.level_scales.shape[3])
        self.dtype = torch.float64 if call.is_float64 else torch.float32

    def output(self) -> Tensor:
        """Return the output [B, n, H, V] of the slice."""
        outputs, blocks = [], None
        for part in self.slices.parts:
            output, blocks = self.local(part)
            outputs.append(output)
        first = self.slices.parts[0]
        incoming = self.incoming(first) if self.slices.older else None
        message = self.message(None if incoming is None else incoming.transition, blocks)
        gathered = all_gather(message, self.slices.processes)
        if incoming is not None:
            outputs[0] = (outputs[0] + self.read(first, incoming, self.carried(gathered))).to(outputs[0].dtype)
        return joined(torch.cat(outputs, 1), gathered)

    def operands(self, part: Part) -> list[Tensor | None]:
        """Return the operands of a part's tokens, without beta for the scalar gate."""
        tensors = self.call.operands if self.is_delta_rule else (*self.call.operands[:4], self.call.level_scales)
        return [None if x is None else x[:, part.begin : part.end] for x in tensors]

    @property
    def is_delta_rule(self) -> bool:
        return self.call.beta is not None

    def sizes(self) -> dict[str, Any]:
        """Return the arguments of `FenwickState.zeros` that all states of the call share."""
        call = self.call
        return dict(
            chunk_size=call.chunk_size,
            groups=call.q.shape[2],
            heads=call.v.shape[2],
            key_dim=call.q.shape[3],
            delta_rule=self.is_delta_rule,
            dtype=self.dtype,
            device=call.v.device,
        )

    def local(self, part: Part) -> tuple[Tensor, Tensor | None]:
        """Return the output of a part from an empty tree, and the final block states if the part's document goes on."""
        call, rows, device = self.call, len(self.call.v), self.call.v.device
        state = None
        if part.position and self.tree.num_columns > 1:
            position = on_device((part.position,) * rows, device)
            state = empty_state(
                rows,
                position=position,
                num_levels=self.tree.num_columns,
                value_dim=call.v.shape[3],
                partition=call.partition,
                **self.sizes(),
            )
        operator = ops.log_linear_delta_rule if self.is_delta_rule else ops.log_linear_attention
        result = operator(
            *self.operands(part),  # type: ignore[arg-type]
            scale=call.scale,
            initial_state=state,
            output_final_state=part.goes_on,
            cu_seqlens=None if part.documents is None else on_device(part.documents, device),
            chunk_size=call.chunk_size,
            partition=call.partition,
            impl=self.impl,
        )
        return result.output, None if result.final_state is None else result.final_state.blocks

    def incoming(self, part: Part) -> Incoming:
        """Return the way in which a part's tokens see a state from before it."""
        if self.is_delta_rule:
            return self._incoming_delta_rule(part)
        q, _, v, log_decay, _ = self.operands(part)
        assert q is not None and v is not None
        if log_decay is None:
            total = v.new_zeros(v.shape[:3], dtype=self.dtype)
        else:
            total = log_decay.to(self.dtype).clamp(min=MIN_LOG_DECAY).cumsum(1)
        decay = total.exp()
        return Incoming(q.to(self.dtype) * self.call.scale, decay, decay[:, -1] if part.goes_on else None)

    def _incoming_delta_rule(self, part: Part) -> Incoming:
        """Return x and P from the linear delta rule that writes nothing and starts at the identity."""
        q, k, v, log_decay, beta, _ = self.operands(part)
        assert q is not None and k is not None and v is not None and beta is not None
        (rows, time, heads, _), key_dim, C = v.shape, q.shape[3], self.call.chunk_size
        # After one chunk that wrote the identity: at position 0 nothing would be read.
        position = torch.full((rows,), C, device=v.device)
        state = FenwickState.zeros(rows, num_levels=1, value_dim=key_dim, position=position, **self.sizes())
        identity = torch.eye(key_dim, dtype=self.dtype, device=v.device).expand_as(state.blocks)
        result = ops.log_linear_delta_rule(
            q,
            k,
            v.new_zeros(rows, time, heads, key_dim),
            log_decay,
            beta,
            torch.ones((), dtype=self.dtype, device=v.device).expand(rows, time, heads, 1),
            scale=self.call.scale,
            initial_state=state._replace(blocks=identity.contiguous()),
            output_final_state=part.goes_on,
            chunk_size=C,
            impl=self.impl,
        )
        transition = None if result.final_state is None else result.final_state.blocks[:, 0]
        return Incoming(result.output.to(self.dtype), None, transition)

    def message(self, transition: Tensor | None, blocks: Tensor | None) -> Tensor:
        """Return all that later slices need of this one, [N, P and the S of each piece]; zeros if it has none."""
        call, rows = self.call, len(self.call.v)
        H, K, V = call.v.shape[2], call.q.shape[3], call.v.shape[3]
        most = most_pieces(self.slices, self.tree)
        sent = torch.zeros((), dtype=self.dtype, device=call.v.device)
        states = sent.expand(rows, 0, H, K, V)
        own = self.slices.span(self.slices.rank)
        if blocks is not None and own is not None:
            states = torch.stack([blocks[:, piece.number] for piece in pieces(*own, self.tree)], 1)
        missing = sent.expand(rows, most - states.shape[1], H, K, V)
        if transition is None:
            transition = sent.expand(rows, H, K, K) if self.is_delta_rule else sent.expand(rows, H)
        message = torch.cat([x.flatten(1) for x in (transition, states, missing)], 1)
        return joined(message, *call.operands)

    def carried(self, gathered: Tensor) -> dict[int, Tensor]:
        """Return older slices' states [N, H, K, V] at the beginning of this one, by the newest token of each bucket."""
        call = self.call
        H, K, V = call.v.shape[2], call.q.shape[3], call.v.shape[3]
        width = H * K * K if self.is_delta_rule else H
        states: dict[int, Tensor] = {}
        tokens: dict[int, int] = {}
        for rank, older in older_pieces(self.slices, self.tree):
            transition, blocks = gathered[rank].tensor_split([width], 1)
            blocks = blocks.unflatten(1, (-1, H, K, V))
            transition = transition.unflatten(1, (H, K, K) if self.is_delta_rule else (H,))
            states = {column: _transported(transition, state) for column, state in states.items()}
            for n, (column, piece) in enumerate(older):
                states[column] = states[column] + blocks[:, n] if column in states else blocks[:, n]
                tokens[column] = max(piece.token, tokens.get(column, 0))
        return {tokens[column]: state for column, state in states.items()}

    def read(self, part: Part, incoming: Incoming, carried: dict[int, Tensor]) -> Tensor:
        """Return the read [B, h, H, V] of the carried states by a part's tokens."""
        columns = runs(part.position, part.last_position, tuple(carried), self.tree)
        lengths = [run.length for run in columns]
        scales = self.call.level_scales[:, part.begin : part.end].to(self.dtype)
        outputs = []
        for run, x, lam, decay in zip(
            columns,
            incoming.x.split(lengths, 1),
            scales.split(lengths, 1),
            [None] * len(lengths) if incoming.decay is None else incoming.decay.split(lengths, 1),
            strict=True,
        ):
            buckets: dict[int, Tensor] = {}
            for column, state in zip(run.columns, carried.values(), strict=True):
                buckets[column] = buckets[column] + state if column in buckets else state
            terms = [lam[..., column, None] * _product(x, state) for column, state in buckets.items()]
            total = torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
            outputs.append(total if decay is None else decay[..., None] * total)
        return torch.cat(outputs, 1)


def _run(sliced: _Sliced) -> Tensor:
    with torch.autocast(sliced.call.v.device.type, enabled=False):  # autocast would break the promise of float32 sums
        return sliced.output()


def _transported(transition: Tensor, state: Tensor) -> Tensor:
    """Return P S for P [N, H] or [N, H, K, K]."""
    return transition @ state if transition.dim() == 4 else transition[..., None, None] * state


def _product(x: Tensor, state: Tensor) -> Tensor:
    """Return x_t^T S [B, h, H, V] for x [B, h, G, K] and the states [N, H, K, V] of every row, G groups of heads."""
    G = x.shape[2]
    wide = state.unflatten(1, (G, -1)).transpose(2, 3).flatten(3)  # [N, G, K, H / G * V]
    y = x.transpose(1, 2) @ wide
    return y.unflatten(3, (-1, state.shape[3])).permute(0, 2, 1, 3, 4).flatten(2, 3)
