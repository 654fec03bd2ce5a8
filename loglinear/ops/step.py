"""The decode steps of the operators: one token for each row of a batch, from a state that changes in place.

The equations are those of `loglinear.ops.api`. A step computes one row of the chunk formulas. It reads the block
states of its past: the sum of the digits of position // C in base radix, so its cost grows with log(T). Blocks are
written only when a chunk is full.
With impl="triton" the CPU does not wait for the device, so a CUDA graph can capture a step.
"""

# N rows, C chunk, M blocks, G groups, H heads, K key, V value, L levels
from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.kernels import MIN_LOG_DECAY
from loglinear.kernels import torch as kernels
from loglinear.ops import impl_reference, impl_triton
from loglinear.ops.announcement import announce
from loglinear.ops.problem import Problem, is_transformed, unit_length
from loglinear.ops.state import DecodeState
from loglinear.ops.validation import (
    BOOL,
    TOKENS,
    check_blocks,
    check_family,
    check_gate,
    check_log_decay,
    check_operands,
    check_state_dtype,
    check_tensor,
    finite_number,
    flag,
    one_of,
)
from loglinear.partition import FENWICK

STEPS = ("auto", "triton", "torch", "reference")


def log_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    level_scales: Tensor,
    state: DecodeState,
    *,
    scale: float = 1.0,
    active: Tensor | None = None,
    sparse: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Return the output of `log_linear_attention` for the next token of every row, and advance `state` in place.

    A step has no derivatives and refuses inputs that require gradients. Use the operator with initial_state for them.

    Args:
        q: [N, G, K], the queries.
        k: [N, G, K], the keys.
        v: [N, H, V], the values.
        log_decay: [N, H], or [N, H, K] if the state has a diagonal gate, natural logarithms, <= 0; None for no decay.
            On the CPU a value above 0 in an active row is refused.
        level_scales: [N, H, L], the lambdas.
        state: A state of N rows, each at its own position; `DecodeState.of(final_state)` makes it. It changes in
            place. It is float64 if an input is, and float32 otherwise.
        scale: The factor of q.
        active: [N] bool. An inactive row gets output 0 and keeps its state. None: all rows are active.
        sparse: True if most lambdas are 0, as with few buckets. triton then does not read their blocks; torch on a CPU
            counts by itself. The output is the same.
        impl: "auto", "triton" (one launch), "torch" or "reference" (the recurrence). "auto" chooses triton on a GPU if
            it supports the step, and torch otherwise. triton supports every partition, with chunks of 16 to 128 tokens,
            but no diagonal gate.

    Returns:
        [N, H, V] in v's dtype.

    Raises:
        ValueError: A shape or dtype does not fit, an input requires gradients, or impl does not support the step. The
            message names the argument, its value and the expected one.
    """
    one_of("impl of a step", impl, STEPS)
    token = Token(q, k, v, log_decay, None, level_scales, state, scale, False, active, sparse)
    return _step("log_linear_attention_step", token.checked(delta_rule=False), impl)


def log_linear_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    level_scales: Tensor,
    state: DecodeState,
    *,
    scale: float = 1.0,
    l2_normalize: bool = False,
    active: Tensor | None = None,
    sparse: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Return the output of `log_linear_delta_rule` for the next token of every row, and advance `state` in place.

    A step has no derivatives and refuses inputs that require gradients. Use the operator with initial_state for them.

    Args:
        q: [N, G, K], the queries.
        k: [N, G, K], the keys.
        v: [N, H, V], the values.
        log_decay: [N, H], or [N, H, K] if the state has a diagonal gate, natural logarithms, <= 0; None for no decay.
            On the CPU a value above 0 in an active row is refused.
        beta: [N, H], the write strength.
        level_scales: [N, H, L], the lambdas.
        state: A state of N rows, each at its own position; `DecodeState.of(final_state)` makes it. It changes in
            place. It is float64 if an input is, and float32 otherwise.
        scale: The factor of q.
        l2_normalize: True to first scale q and k to length 1, x / sqrt(|x|^2 + 1e-6).
        active: [N] bool. An inactive row gets output 0 and keeps its state. None: all rows are active.
        sparse: True if most lambdas are 0, as with few buckets. triton then does not read their blocks; torch on a CPU
            counts by itself. The output is the same.
        impl: "auto", "triton", "torch" or "reference", as in `log_linear_attention_step`.

    Returns:
        [N, H, V] in v's dtype.

    Raises:
        ValueError: An argument does not fit, an input requires gradients, or impl does not support the step.
    """
    one_of("impl of a step", impl, STEPS)
    token = Token(q, k, v, log_decay, beta, level_scales, state, scale, l2_normalize, active, sparse)
    return _step("log_linear_delta_rule_step", token.checked(delta_rule=True), impl)


class Token(NamedTuple):
    """The arguments of one step: shapes as in `log_linear_attention_step`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    level_scales: Tensor
    state: DecodeState
    scale: float
    l2_normalize: bool
    active: Tensor | None
    sparse: bool

    def checked(self, *, delta_rule: bool) -> Token:
        """Return the same call with normalised arguments and zeros for no decay.

        Raises:
            ValueError: An argument does not fit the state, or requires gradients; one line names it.
        """
        if not isinstance(self.state, DecodeState):
            kind = type(self.state).__name__
            raise ValueError(f"state must be a DecodeState (DecodeState.of(final_state)), got {kind}")
        fenwick, sizes = self.state.fenwick, self.state.sizes()
        check_family("state", fenwick.beta is not None, delta_rule)
        check_operands(self, TOKENS[delta_rule], sizes, fenwick.k.device)
        check_blocks(fenwick.partition or FENWICK, sizes["L"], sizes["C"], sizes["M"])
        if self.active is not None:
            check_tensor("active", self.active, "N", sizes, fenwick.k.device, BOOL)
        if self.log_decay is not None:
            check_gate("state", fenwick, self.log_decay.dim() == 3)
        check_log_decay(self.log_decay, self.active)
        flag("l2_normalize", self.l2_normalize)
        flag("sparse", self.sparse)
        self.refuse_derivatives(TOKENS[delta_rule])
        check_state_dtype("state", fenwick, [getattr(self, name) for name in TOKENS[delta_rule]])
        scale, log_decay = finite_number("scale", self.scale), self.log_decay
        if log_decay is None:
            log_decay = torch.zeros_like(fenwick.log_decay[:, 0])
        if scale is self.scale and log_decay is self.log_decay:
            return self
        return self._replace(scale=scale, log_decay=log_decay)

    def refuse_derivatives(self, names: Iterable[str]) -> None:
        """Raise ValueError if a tensor of these names would need a derivative, which a step does not compute."""
        transformed = is_transformed()
        if not transformed and not torch.is_grad_enabled():
            return
        tensors = {name: getattr(self, name) for name in names}
        wanted = [name for name, x in tensors.items() if x is not None and x.requires_grad]
        if transformed or wanted:
            who = " and ".join(wanted) or "torch.func or forward-mode AD"
            raise ValueError(
                f"a step has no derivatives, but {who} would need one: "
                "use torch.no_grad(), or the operator with initial_state"
            )


def check_step(*token: Tensor | None, num_levels: int, state: DecodeState, active: Tensor | None, impl: str) -> None:
    """Raise the ValueError of an operator's step, whose lambda is not known yet: [N, H, num_levels] in float32.

    The lambda of a routed read comes from sums that change when they are read. Without this check they would have
    changed when the step raises.

    Args:
        token: q, k, v, log_decay and, for the delta rule, beta, as in the steps.
        num_levels: L.
        state: The state that the step would change.
        active: As in the steps.
        impl: As in the steps.
    """
    q, k, v, log_decay, beta = (*token, None)[:5]
    assert q is not None and k is not None and v is not None
    level_scales = v.new_empty(1, dtype=torch.float32).expand(*v.shape[:2], num_levels)
    Token(q, k, v, log_decay, beta, level_scales, state, 1.0, False, active, False).checked(delta_rule=len(token) == 5)
    _unsupported(q, v, state, impl)


def _unsupported(q: Tensor, v: Tensor, state: DecodeState, impl: str) -> str | None:
    """Return the reason why triton does not support a step, or None; ValueError if impl is "triton" all the same."""
    reason = impl_triton.unsupported_step(q, v, state)
    if impl == "triton" and reason is not None:
        raise ValueError(reason)
    return reason


@torch.no_grad()
def _step(operator: str, token: Token, impl: str) -> Tensor:
    """Choose an implementation and run it."""
    reason = _unsupported(token.q, token.v, token.state, impl)
    on_gpu = token.v.device.type == "cuda"
    chosen = ("triton" if reason is None and on_gpu else "torch") if impl == "auto" else impl
    announce(operator, chosen, reason if impl == "auto" and on_gpu else None)
    if chosen != "triton":
        run = _torch_step if chosen == "torch" else _reference_step
        if not torch.is_autocast_enabled(token.v.device.type):
            return run(token)  # turning it off takes as long as an operation
        with torch.autocast(token.v.device.type, enabled=False):
            return run(token)
    from loglinear.kernels.triton.args import DecodeState as Arrays
    from loglinear.kernels.triton.step import Operands, step

    q, k, v, log_decay, beta, level_scales, state, scale, l2_normalize, active, sparse = token
    assert log_decay is not None
    s = state.fenwick
    arrays = Arrays(s.position, s.blocks, s.k, s.v, s.log_decay, s.beta, state.inverse)
    operands = Operands(q, k, v, log_decay, beta, level_scales, active)
    return step(operands, arrays, scale, l2_normalize, s.partition or FENWICK, sparse)


def _reference_step(token: Token) -> Tensor:
    """Run the recurrence in the state's dtype."""
    q, k, v, log_decay, beta, level_scales, state, scale, l2_normalize, active, _ = token
    if l2_normalize:
        q, k = unit_length(q), unit_length(k)
    assert log_decay is not None

    def sequence(x: Tensor) -> Tensor:
        return x.unsqueeze(1).to(state.fenwick.k.dtype)

    call = Problem(
        sequence(q),
        sequence(k),
        sequence(v),
        sequence(log_decay),
        None if beta is None else sequence(beta),
        sequence(level_scales),
        scale,
        state.fenwick,
        True,
        None,
        state.fenwick.chunk_size,
        state.fenwick.partition or FENWICK,
    )
    return impl_reference.step(call, state, active).to(v.dtype)


def _torch_step(token: Token) -> Tensor:
    """Run one row of the chunk formulas in plain torch."""
    q, k, v, log_decay, beta, level_scales, state, scale, l2_normalize, active, _ = token
    assert log_decay is not None
    s, dtype, partition = state.fenwick, state.fenwick.blocks.dtype, state.fenwick.partition or FENWICK
    if l2_normalize:
        q, k = unit_length(q), unit_length(k)
    q, level_scales = q.to(dtype), level_scales.to(dtype)
    if scale != 1.0:
        q = q * scale
    place, C = s.position % s.chunk_size, s.chunk_size
    row = torch.arange(len(place), device=place.device)
    for buffer, new in ((s.k, k), (s.v, v), (s.log_decay, log_decay.clamp(min=MIN_LOG_DECAY)), (s.beta, beta)):
        if buffer is not None and new is not None:
            if active is not None:  # NaN in an inactive row's inputs must not reach its state
                new = torch.where(active.view(-1, *[1] * (new.dim() - 1)), new, 0.0)
            buffer[row, place] = new.to(dtype)
    full = place == C - 1 if active is None else (place == C - 1) & active
    if beta is None:
        out = kernels.scalar_gate_step(q, s.k, s.v, s.log_decay, level_scales, s.blocks, s.position, full, partition)
    else:
        assert s.beta is not None and state.inverse is not None
        kernels.append_inverse_row(state.inverse, s.k, s.beta, s.log_decay, place)
        out = kernels.delta_rule_step(
            q, s.k, s.v, s.log_decay, s.beta, state.inverse, level_scales, s.blocks, s.position, full, partition
        )
    if active is None:
        s.position.add_(1)
    else:
        s.position.add_(active)
        out = torch.where(active[:, None, None], out, 0.0)
    return out.to(v.dtype)
