"""The two public operators: validate once, choose an implementation, run it.

    scalar gate :  S_t = a_t S_{t-1} + k_t v_t^T                              a_t = exp(log_decay_t)
    delta rule  :  S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T

    o_t = sum_l lambda[t, l] * scale * q_t^T S_t^(l)

where S_t^(l) is the part of the state that was written by the tokens s with min(level(t, s), L - 1) = l, and
level(t, s) = bit_length(t XOR s) (see `loglinear.fenwick`). With all lambda equal to 1 this is the linear model.
"""

# B batch, T time, G query/key groups, H value heads, K key, V value, L levels, N sequences
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.fenwick import num_blocks
from loglinear.ops import impl_triton
from loglinear.ops.announcement import announce
from loglinear.ops.impl_reference import run as run_reference
from loglinear.ops.impl_torch import run as run_torch
from loglinear.ops.problem import Problem, unit_length
from loglinear.ops.state import FenwickState, check_family, for_backward


class LogLinearOutput(NamedTuple):
    output: Tensor
    final_state: FenwickState | None


Implementation = Callable[[Problem], tuple[Tensor, "FenwickState | None"]]
IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton": impl_triton.run,
    "torch": run_torch,
    "reference": run_reference,
}


def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    level_scales: Tensor,
    *,
    scale: float = 1.0,
    initial_state: FenwickState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    impl: str = "auto",
) -> LogLinearOutput:
    """Log-linear attention with a scalar gate (linear attention, RetNet, simple GLA, Mamba-2).

        S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T,    o_t = sum_l level_scales[t, l] * scale * q_t^T S_t^(l)

    Args:
        q, k: [B, T, G, K]; value head h reads group h // (H / G).
        v: [B, T, H, V], H a multiple of G.
        log_decay: [B, T, H], natural logarithm, <= 0; None for no decay. Below -80 it counts as -80 (a full reset).
        level_scales: [B, T, H, L], the lambdas. Levels clamp at L - 1, so any T goes with any L >= 1; L = 1 is the
            linear model times one lambda.
        scale: multiplies q.
        initial_state: continue from here, at any position. One row per sequence.
        output_final_state: also return the state after the last token.
        cu_seqlens: [N + 1] integers from 0 to T, non-decreasing: packed sequences (B = 1), each with its own tree.
        chunk_size: tokens per chunk, a power of two. Results do not depend on it; the layout of a state does.
        impl: "auto", "triton" (the Fenwick-array algorithm on a GPU; "auto" takes it there where it can serve),
            "torch" (the same algorithm anywhere) or "reference" (token by token). A call that it cannot serve raises.
            triton continues states at positions below 65,536 chunks; beyond, the device's check ends the process: use
            torch there.

    Returns:
        `LogLinearOutput(output, final_state)`: output [B, T, H, V] in v's dtype; final_state is None unless asked
        for, float32 (float64 for float64 inputs). torch computes 16-bit inputs in float32; triton accumulates in
        float32 and multiplies bfloat16 inputs and block states in bfloat16, float16 ones in tf32, float32 ones in
        three tf32 products.

    Raises:
        ValueError: a shape, dtype, state or cu_seqlens that does not fit; the text says which and what was expected.

    Source: arXiv 2506.04761, equations 4 to 6; capped levels are this library's.
    """
    return _dispatch(
        "log_linear_attention",
        dict(q=q, k=k, v=v, log_decay=log_decay, level_scales=level_scales),
        scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl,
    )  # fmt: skip


def log_linear_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    level_scales: Tensor,
    *,
    scale: float = 1.0,
    l2_normalize: bool = False,
    initial_state: FenwickState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    impl: str = "auto",
) -> LogLinearOutput:
    """Log-linear attention with the delta rule (DeltaNet, Gated DeltaNet).

        S_t = exp(log_decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        o_t = sum_l level_scales[t, l] * scale * q_t^T S_t^(l)

    Args:
        beta: [B, T, H], the write strength. States stay bounded when 0 <= beta * |k|^2 <= 2: use unit keys.
        l2_normalize: first bring q and k to length 1, x / sqrt(|x|^2 + 1e-6), as Gated DeltaNet does.
        the others, the result and the errors: as in `log_linear_attention`.

    Source: arXiv 2506.04761, equation 8; Yang, Kautz, Hatamizadeh, arXiv 2412.06464 (the linear Gated DeltaNet).
    """
    if l2_normalize:
        q, k = (_unit_length(name, x) for name, x in (("q", q), ("k", k)))
    return _dispatch(
        "log_linear_delta_rule",
        dict(q=q, k=k, v=v, log_decay=log_decay, beta=beta, level_scales=level_scales),
        scale, initial_state, output_final_state, cu_seqlens, chunk_size, impl,
    )  # fmt: skip


def _unit_length(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    return unit_length(x)


def _dispatch(
    operator: str,
    tensors: dict[str, Tensor | None],
    scale: float,
    initial_state: FenwickState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    impl: str,
) -> LogLinearOutput:
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {['auto', *IMPLEMENTATIONS]}, got {impl!r}")
    _check_tensors(tensors)
    if not isinstance(chunk_size, int) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}")
    if not isinstance(scale, int | float):
        raise ValueError(f"scale must be a number, got {scale!r}")
    q, k, v, level_scales = (tensors[name] for name in ("q", "k", "v", "level_scales"))
    assert q is not None and k is not None and v is not None and level_scales is not None
    _check_cu_seqlens(v, cu_seqlens)
    problem = Problem(
        q, k, v, tensors["log_decay"], tensors.get("beta"), level_scales, float(scale),
        initial_state, output_final_state, cu_seqlens, chunk_size,
    )  # fmt: skip
    if initial_state is not None:
        _check_state(initial_state, tensors, problem.num_sequences, chunk_size)
        problem = replace(problem, initial_state=for_backward(initial_state))
    chosen, reason = _automatic(problem) if impl == "auto" else (impl, None)
    announce(operator, chosen, reason)
    with torch.autocast(v.device.type, enabled=False):  # the accumulation in float32 is a promise, not a preference
        output, final_state = IMPLEMENTATIONS[chosen](problem)
    return LogLinearOutput(output.to(v.dtype), final_state)


def _automatic(problem: Problem) -> tuple[str, str | None]:
    """triton where it can serve on a GPU, and why it cannot; a single token is not worth kernels for chunks."""
    is_step = problem.initial_state is not None and problem.v.shape[1] == 1
    if problem.v.device.type != "cuda" or is_step:
        return "torch", None
    reason = impl_triton.unsupported(problem)
    return ("triton", None) if reason is None else ("torch", reason)


def _check_tensors(tensors: dict[str, Tensor | None]) -> None:
    """Every argument's rank, shape, dtype and device against q's and v's."""
    for name, x in tensors.items():
        if x is None and name == "log_decay":
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    q, v = tensors["q"], tensors["v"]
    assert q is not None and v is not None
    for name, x, axes in (("q", q, "[B, T, G, K]"), ("v", v, "[B, T, H, V]")):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions {axes}, got shape {tuple(x.shape)}")
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    B, T, G, _ = q.shape
    H = v.shape[2]
    if v.shape[:2] != (B, T):
        raise ValueError(f"v must start with q's [B, T] = [{B}, {T}], got shape {tuple(v.shape)}")
    if H % G:
        raise ValueError(f"v's H = {H} heads must be a multiple of q's G = {G} groups")
    scales = tensors["level_scales"]
    L = scales.shape[3] if scales is not None and scales.dim() == 4 else "L"
    expected = {
        "k": ("[B, T, G, K]", tuple(q.shape)),
        "log_decay": ("[B, T, H]", (B, T, H)),
        "beta": ("[B, T, H]", (B, T, H)),
        "level_scales": ("[B, T, H, L]", (B, T, H, L)),
    }
    for name, (axes, shape) in expected.items():
        x = tensors.get(name)
        if x is not None and tuple(x.shape) != shape:
            expected_text = ", ".join(map(str, shape))
            raise ValueError(f"{name} must have shape {axes} = [{expected_text}], got {list(x.shape)}")
    if L == 0:
        raise ValueError("level_scales must have at least one level, got L = 0")
    devices = {x.device for x in tensors.values() if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(str(device) for device in devices)}")


def _check_cu_seqlens(v: Tensor, cu_seqlens: Tensor | None) -> None:
    """On a GPU its numbers are checked there, without waiting: a wrong one ends the process with the same text. So they
    are in a compiled graph, which would break where Python looks at them."""
    if cu_seqlens is None:
        return
    B, T = v.shape[:2]
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be a tensor of integers, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must have shape [N + 1] with N >= 1, got {list(cu_seqlens.shape)}")
    if cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise ValueError(f"cu_seqlens must hold integers, got {cu_seqlens.dtype}")
    if B != 1:
        raise ValueError(f"cu_seqlens needs a packed batch with B = 1, got B = {B}")
    if cu_seqlens.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(cu_seqlens[0] == 0, "cu_seqlens must start at 0")
        torch._assert_async(cu_seqlens[-1] == T, f"cu_seqlens must end at T = {T}")
        torch._assert_async((cu_seqlens.long().diff() >= 0).all(), "cu_seqlens must not decrease")
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {ends[0]}")
    if ends[-1] != T:
        raise ValueError(f"cu_seqlens must end at T = {T}, got {ends[-1]}")
    if any(end < start for start, end in zip(ends[:-1], ends[1:], strict=True)):
        raise ValueError(f"cu_seqlens must not decrease, got {ends}")


def _check_state(state: FenwickState, tensors: dict[str, Tensor | None], rows: int, chunk_size: int) -> None:
    if not isinstance(state, FenwickState):
        raise ValueError(f"initial_state must be a FenwickState, got {type(state).__name__}")
    q, v, scales = tensors["q"], tensors["v"], tensors["level_scales"]
    assert q is not None and v is not None and scales is not None
    (G, K), (H, V), L, C = q.shape[2:], v.shape[2:], scales.shape[3], chunk_size
    check_family("initial_state", state, "beta" in tensors)
    if state.chunk_size != C:
        raise ValueError(f"initial_state was made with chunk_size {state.chunk_size}, got chunk_size {C}")
    expected = {
        "position": (rows,),
        "blocks": (rows, num_blocks(L, C), H, K, V),
        "k": (rows, C, G, K),
        "v": (rows, C, H, V),
        "log_decay": (rows, C, H),
        "beta": (rows, C, H),
    }
    for name, shape in expected.items():
        part = getattr(state, name)
        if part is not None and tuple(part.shape) != shape:
            raise ValueError(f"initial_state.{name} must have shape {list(shape)}, got {list(part.shape)}")
        if part is not None and part.is_floating_point() != (name != "position"):
            kind = "integers" if name == "position" else "floating-point numbers"
            raise ValueError(f"initial_state.{name} must hold {kind}, got {part.dtype}")
        if part is not None and part.device != v.device:
            raise ValueError(f"initial_state.{name} must be on {v.device}, got {part.device}")
