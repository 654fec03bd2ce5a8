"""Decoding: one token for each row of a batch, in place.

The equations are those of `loglinear.ops.api`. A step computes one row of the chunk formulas and reads the popcount of
position // C block states, which are only read until the chunk is full: its cost grows with log2(T), and the state
stays where it is. impl="triton" does not wait for the device, so that a step can be captured in a CUDA graph.
"""

# N rows, C chunk, M blocks, G groups, H heads, K key, V value, L levels
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.fenwick import num_blocks
from loglinear.kernels import MIN_LOG_DECAY
from loglinear.kernels import torch as kernels
from loglinear.ops import impl_reference, impl_triton
from loglinear.ops.announcement import announce
from loglinear.ops.problem import Problem, unit_length
from loglinear.ops.state import DecodeState, check_family

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
    impl: str = "auto",
) -> Tensor:
    """The next token of `log_linear_attention` for every row, [N, H, V] in v's dtype; `state` moves on in place.

    Without gradients: whoever needs them calls the operator with initial_state.

    Args:
        q, k: [N, G, K]; v: [N, H, V]; log_decay: [N, H] or None; level_scales: [N, H, L].
        state: of N rows, each at a position of its own. `DecodeState.of(final_state)` makes it.
        scale: multiplies q.
        active: [N] bool; rows that are not get 0 and keep their state (None: all are active).
        impl: "auto", "triton" (one launch; "auto" takes it on a GPU), "torch" or "reference" (the recurrence).

    Raises:
        ValueError: a shape or dtype that does not fit, or an impl that cannot serve; the text says what was expected.
    """
    return _step(q, k, v, log_decay, None, level_scales, state, scale, False, active, impl)


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
    impl: str = "auto",
) -> Tensor:
    """The next token of `log_linear_delta_rule` for every row; beta [N, H], all else as `log_linear_attention_step`."""
    return _step(q, k, v, log_decay, beta, level_scales, state, scale, l2_normalize, active, impl)


@torch.no_grad()
def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, level_scales: Tensor,
    state: DecodeState, scale: float, l2_normalize: bool, active: Tensor | None, impl: str,
) -> Tensor:  # fmt: skip
    if impl not in STEPS:
        raise ValueError(f"impl of a step must be one of {list(STEPS)}, got {impl!r}")
    _check(q, k, v, log_decay, beta, level_scales, state, active)
    if log_decay is None:
        log_decay = torch.zeros(v.shape[:2], dtype=state.fenwick.blocks.dtype, device=v.device)
    reason = impl_triton.unsupported_step(q, v, state)
    if impl == "triton" and reason is not None:
        raise ValueError(reason)
    on_gpu = v.device.type == "cuda"
    chosen = ("triton" if reason is None and on_gpu else "torch") if impl == "auto" else impl
    operator = "log_linear_attention_step" if beta is None else "log_linear_delta_rule_step"
    announce(operator, chosen, reason if impl == "auto" and on_gpu else None)
    if chosen == "triton":
        from loglinear.kernels.triton import step

        s = state.fenwick
        return step(
            q, k, v, log_decay, beta, level_scales, active, s.position, s.blocks, s.k, s.v, s.log_decay, s.beta,
            state.inverse, scale, l2_normalize,
        )  # fmt: skip
    with torch.autocast(v.device.type, enabled=False):
        if chosen == "reference":
            q, k = (unit_length(q), unit_length(k)) if l2_normalize else (q, k)
            q, k, v, log_decay, level_scales = (x.unsqueeze(1) for x in (q, k, v, log_decay, level_scales))
            beta, C = None if beta is None else beta.unsqueeze(1), state.fenwick.chunk_size
            problem = Problem(q, k, v, log_decay, beta, level_scales, scale, state.fenwick, True, None, C)
            return impl_reference.step(problem, state, active)
        return _torch_step(q, k, v, log_decay, beta, level_scales, state, scale, l2_normalize, active)


def _torch_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, level_scales: Tensor,
    state: DecodeState, scale: float, l2_normalize: bool, active: Tensor | None,
) -> Tensor:  # fmt: skip
    s, dtype = state.fenwick, state.fenwick.blocks.dtype
    if l2_normalize:
        q, k = unit_length(q), unit_length(k)
    q, level_scales = q.to(dtype) * scale, level_scales.to(dtype)
    place, C = s.position % s.chunk_size, s.chunk_size
    row = torch.arange(len(place), device=place.device)
    for buffer, token in ((s.k, k), (s.v, v), (s.log_decay, log_decay.clamp(min=MIN_LOG_DECAY)), (s.beta, beta)):
        if buffer is not None and token is not None:
            if active is not None:  # what an idle row is given counts for nothing, not even as NaN
                token = torch.where(active.view(-1, *[1] * (token.dim() - 1)), token, 0.0)
            buffer[row, place] = token.to(dtype)
    full = place == C - 1 if active is None else (place == C - 1) & active
    if beta is None:
        out, blocks = kernels.scalar_gate_step(q, s.k, s.v, s.log_decay, level_scales, s.blocks, s.position, full)
    else:
        assert s.beta is not None and state.inverse is not None
        kernels.append_inverse_row(state.inverse, s.k, s.beta, s.log_decay, place)
        out, blocks = kernels.delta_rule_step(
            q, s.k, s.v, s.log_decay, s.beta, state.inverse, level_scales, s.blocks, s.position, full
        )
    if blocks is not s.blocks:
        s.blocks.copy_(blocks)
    if active is None:
        s.position.add_(1)
    else:
        s.position.add_(active)
        out = torch.where(active[:, None, None], out, 0.0)
    return out.to(v.dtype)


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, level_scales: Tensor,
    state: DecodeState, active: Tensor | None,
) -> None:  # fmt: skip
    """Every argument against the state, whose sizes are the truth."""
    if not isinstance(state, DecodeState):
        raise ValueError(f"state must be a DecodeState (DecodeState.of(final_state)), got {type(state).__name__}")
    s = state.fenwick
    (N, M, H, K, V), (C, G) = s.blocks.shape, s.k.shape[1:3]
    check_family("state", s, beta is not None)
    L = level_scales.shape[-1] if isinstance(level_scales, Tensor) and level_scales.dim() else 1
    expected = {
        "q": (q, (N, G, K)), "k": (k, (N, G, K)), "v": (v, (N, H, V)), "log_decay": (log_decay, (N, H)),
        "beta": (beta, (N, H)), "level_scales": (level_scales, (N, H, L)), "active": (active, (N,)),
    }  # fmt: skip
    for name, (x, shape) in expected.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)} as the state has it, got {list(x.shape)}")
        if x.device != s.blocks.device:
            raise ValueError(f"{name} must be on the state's device {s.blocks.device}, got {x.device}")
        if x.dtype != torch.bool if name == "active" else not x.is_floating_point():
            kind = "bool" if name == "active" else "floating-point numbers"
            raise ValueError(f"{name} must hold {kind}, got {x.dtype}")
    L = level_scales.shape[2]
    if num_blocks(L, C) != M:
        raise ValueError(
            f"level_scales has {L} levels, which need {num_blocks(L, C)} blocks of state; this one has {M}"
        )
