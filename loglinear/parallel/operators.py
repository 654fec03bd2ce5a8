"""Both operators on sequences that lie on several devices.

Every rank runs the operator on its own slice, from an empty tree at the position of the slice. The read of the past is
linear in the states. So the older slices add one term for each bucket c that holds some of their tokens:

    o_t = local_t + sum_c lambda[t, c] * x_t^T S_c            x_t^T = scale * q_t^T A_t ... A_1

A_1, ..., A_t are the transitions of the slice's tokens up to t, and lambda are the level scales. Each older slice sends
its transition P, and one state S for each bucket that holds its tokens. They give the states S_c at the beginning of a
slice, oldest slice first:

    S_c <- P S_c + sum of the slice's S that are in bucket c

The forward pass has one collective, an all-gather of every rank's (P, S). The backward pass has one reduce-scatter of
their gradients.
"""

# B batch, n tokens of a slice, G groups, H heads, K key, V value, L levels, N sequences, C chunk
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loglinear import ops
from loglinear.ops.problem import Problem, unit_length
from loglinear.ops.state import empty_state
from loglinear.ops.validation import flag, working_dtype
from loglinear.parallel.collectives import all_gather, between_graphs, joined
from loglinear.parallel.incoming import incoming, transported
from loglinear.parallel.layouts import check_batch, most_pieces, older_pieces, on_device
from loglinear.parallel.older import with_older
from loglinear.parallel.pieces import Tree, pieces, runs
from loglinear.partition import FENWICK, Partition

if TYPE_CHECKING:
    from loglinear.parallel.slices import Part, Slices


@between_graphs
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

    Every rank of the mesh dimension must call it. If one rank runs the backward pass, every rank must. The slice costs
    one more matrix product [n, K] x [K, V] for each head and each bucket with tokens of older slices.

    Args:
        q: [B, n, G, K], the queries of this rank's tokens, as `slices.take` gives them; so are the other tensors.
        k: [B, n, G, K].
        v: [B, n, H, V].
        log_decay: [B, n, H] or [B, n, H, K], or None for no decay.
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


@between_graphs
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

    The call is as that of `log_linear_attention` in this module, with one more cost. A slice that continues a document
    also runs the linear delta rule (L = 1) on K value columns. That run writes nothing and starts at the identity. Its
    output holds the x_t of all tokens, and its final state is the slice's P.

    Args:
        q: [B, n, G, K], the queries of this rank's tokens, as `slices.take` gives them; so are the other tensors.
        k: [B, n, G, K].
        v: [B, n, H, V].
        log_decay: [B, n, H] or [B, n, H, K], or None for no decay.
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


class _Sliced:
    """One call: the operands of a slice, the slices and the tree."""

    def __init__(self, call: Problem, slices: Slices, impl: str) -> None:
        check_batch(slices, call.q, call.chunk_size)
        self.call, self.slices, self.impl = call, slices, impl
        self.tree = Tree(call.partition, call.chunk_size, call.level_scales.shape[3])
        self.dtype = working_dtype(call.operands)
        H, K, V = call.v.shape[2], call.q.shape[3], call.v.shape[3]
        gate_shape = (H, K) if call.is_diagonal else (H,)
        self.state_shape, self.transition_shape = (H, K, V), gate_shape if call.beta is None else (H, K, K)

    def output(self) -> Tensor:
        """Return the output [B, n, H, V] of the slice."""
        outputs, blocks, older = [], None, None
        for part in self.slices.parts:
            output, blocks = self.local(part)
            outputs.append(output)
        first = self.slices.parts[0]
        tokens = self.tokens(first)
        if self.slices.older:
            older = incoming(tokens, self.impl, first.goes_on)
        gathered = all_gather(self.message(older and older.transition, blocks), self.slices.processes)
        if older is not None:
            states = self.carried(gathered)
            seen = runs(first.position, first.last_position, tuple(states), self.tree)
            outputs[0] = with_older(outputs[0], older, tokens.level_scales, list(states.values()), seen)
        return joined(torch.cat(outputs, 1), gathered)

    def tokens(self, part: Part) -> Problem:
        """Return the call for the tokens of a part."""
        call = self.call
        log_decay, beta = (None if x is None else x[:, part.begin : part.end] for x in (call.log_decay, call.beta))
        q, k, v, scales = (x[:, part.begin : part.end] for x in (call.q, call.k, call.v, call.level_scales))
        return replace(call, q=q, k=k, v=v, log_decay=log_decay, beta=beta, level_scales=scales)

    def local(self, part: Part) -> tuple[Tensor, Tensor | None]:
        """Return the output of a part from an empty tree, and the final block states if the part's document goes on."""
        call, device = self.tokens(part), self.call.v.device
        rows, (H, K, V), state = len(call.v), self.state_shape, None
        if part.position and self.tree.num_columns > 1:
            state = empty_state(
                rows,
                position=on_device((part.position,) * rows, device),
                num_levels=self.tree.num_columns,
                chunk_size=call.chunk_size,
                groups=call.q.shape[2],
                heads=H,
                key_dim=K,
                value_dim=V,
                delta_rule=call.beta is not None,
                diagonal_gate=call.is_diagonal,
                dtype=self.dtype,
                device=device,
                partition=call.partition,
            )
        options: dict[str, Any] = dict(
            scale=call.scale,
            initial_state=state,
            output_final_state=part.goes_on,
            cu_seqlens=None if part.documents is None else on_device(part.documents, device),
            chunk_size=call.chunk_size,
            partition=call.partition,
            impl=self.impl,
        )
        if call.beta is None:
            result = ops.log_linear_attention(call.q, call.k, call.v, call.log_decay, call.level_scales, **options)
        else:
            gates = call.log_decay, call.beta
            result = ops.log_linear_delta_rule(call.q, call.k, call.v, *gates, call.level_scales, **options)
        return result.output, None if result.final_state is None else result.final_state.blocks

    def message(self, transition: Tensor | None, blocks: Tensor | None) -> Tensor:
        """Return all that later slices need of this one, [N, P and the S of each piece]; zeros if it has none."""
        rows, most = len(self.call.v), most_pieces(self.slices, self.tree)
        nothing = torch.zeros((), dtype=self.dtype, device=self.call.v.device)
        sent = [nothing.expand(rows, *self.transition_shape) if transition is None else transition]
        own = self.slices.spans[self.slices.rank]
        if blocks is not None and own is not None:
            sent += [blocks[:, piece.number] for piece in pieces(*own, self.tree)]
        sent += [nothing.expand(rows, *self.state_shape)] * (most + 1 - len(sent))
        return joined(torch.cat([x.flatten(1) for x in sent], 1), *self.call.operands)

    def carried(self, gathered: Tensor) -> dict[int, Tensor]:
        """Return older slices' states [N, H, K, V] at the beginning of this one, by the newest token of each bucket."""
        states: dict[int, Tensor] = {}
        tokens: dict[int, int] = {}
        for rank, older in older_pieces(self.slices, self.tree):
            flat, blocks = gathered[rank].tensor_split([math.prod(self.transition_shape)], 1)
            transition, blocks = flat.unflatten(1, self.transition_shape), blocks.unflatten(1, (-1, *self.state_shape))
            states = {column: transported(transition, state) for column, state in states.items()}
            for n, (column, piece) in enumerate(older):
                states[column] = states[column] + blocks[:, n] if column in states else blocks[:, n]
                tokens[column] = max(piece.token, tokens.get(column, 0))
        return {tokens[column]: state for column, state in states.items()}


def _run(sliced: _Sliced) -> Tensor:
    with torch.autocast(sliced.call.v.device.type, enabled=False):  # autocast would break the promise of float32 sums
        return sliced.output()
