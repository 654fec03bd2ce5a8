"""The effect of a slice's tokens on older states: each token's view x_t of them, and their transition P at the end.

    x_t^T = scale * q_t^T A_t ... A_1        P = A_n ... A_1        A_t the transition of token t

    gate       :  A_t = Diag(a_t)
    delta rule :  A_t = (I - beta_t k_t k_t^T) Diag(a_t)

A scalar gate has one decay a_t for all channels of the keys, a diagonal gate one for each.

For the delta rule, x and P come from one call of the linear rule (L = 1) that writes nothing and starts at the
identity. x is its output, and P its final state.
"""

# B batch, T time, G groups, H heads, K key, V value, N sequences, C chunk
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loglinear import ops
from loglinear.ops import FenwickState
from loglinear.ops.problem import MIN_LOG_DECAY, Problem
from loglinear.ops.validation import working_dtype


class Incoming(NamedTuple):
    """The effect of some tokens on states from before them."""

    x: Tensor
    """[B, T, G, K], the queries (scalar gate), or [B, T, H, K], the x_t (diagonal gate, delta rule)."""
    decay: Tensor | None
    """[B, T, H], the factor scale a_t ... a_1 of the queries; None if x contains it."""
    transition: Tensor | None
    """P, [N, H] (scalar gate), [N, H, K] (diagonal gate) or [N, H, K, K] (delta rule); None if no slice needs it."""


def incoming(call: Problem, impl: str, goes_on: bool) -> Incoming:
    """Return the effect of a call's tokens; a document that goes on into the next slice needs its transition too."""
    dtype = working_dtype(call.operands)
    if call.beta is not None:
        return _delta_rule(call, dtype, impl, goes_on)
    if call.log_decay is None:
        decay = call.v.new_ones(call.v.shape[:3], dtype=dtype)
    else:
        decay = call.log_decay.to(dtype).clamp(min=MIN_LOG_DECAY).cumsum(1).exp()
    transition = decay[:, -1] if goes_on else None
    if call.is_diagonal:
        queries = call.q.to(dtype).repeat_interleave(call.v.shape[2] // call.q.shape[2], 2)
        return Incoming(queries * decay * call.scale, None, transition)
    return Incoming(call.q, decay * call.scale, transition)


def _delta_rule(call: Problem, dtype: torch.dtype, impl: str, goes_on: bool) -> Incoming:
    assert call.beta is not None
    (rows, time, groups, K), heads, C, device = call.q.shape, call.v.shape[2], call.chunk_size, call.v.device
    state = FenwickState.zeros(
        rows,
        num_levels=1,
        chunk_size=C,
        groups=groups,
        heads=heads,
        key_dim=K,
        value_dim=K,
        delta_rule=True,
        diagonal_gate=call.is_diagonal,
        position=torch.full((rows,), C, device=device),  # after a chunk that wrote I: at 0 there is nothing to read
        dtype=dtype,
        device=device,
    )
    identity = torch.eye(K, dtype=dtype, device=device).expand_as(state.blocks).contiguous()
    result = ops.log_linear_delta_rule(
        call.q,
        call.k,
        call.v.new_zeros(1).expand(rows, time, heads, K),
        call.log_decay,
        call.beta,
        torch.ones(1, dtype=dtype, device=device).expand(rows, time, heads, 1),
        scale=call.scale,
        initial_state=FenwickState(state.position, identity, *state[2:]),
        output_final_state=goes_on,
        chunk_size=C,
        impl=impl,
    )
    return Incoming(result.output, None, None if result.final_state is None else result.final_state.blocks[:, 0])


def transported(transition: Tensor, state: Tensor) -> Tensor:
    """Return P S for P [N, H], [N, H, K] or [N, H, K, K] and S [N, H, K, V]."""
    if transition.dim() == 4:
        return transition @ state
    return transition.view(*transition.shape, *[1] * (4 - transition.dim())) * state
