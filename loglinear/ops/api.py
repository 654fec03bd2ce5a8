"""The two public operators: each checks its call once, chooses an implementation and runs it.

    gate       :  S_t = Diag(a_t) S_{t-1} + k_t v_t^T                              a_t = exp(log_decay_t)
    delta rule :  S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_{t-1} + beta_t k_t v_t^T

    o_t = sum_l lambda[t, l] * scale * q_t^T S_t^(l)

A scalar gate has one decay a_t for all channels of the keys, a diagonal gate one for each. S_t^(l) is the part of the
state that the tokens s with min(index(t, s), L - 1) = l wrote. A partition of the past gives index(t, s); see
`loglinear.partition`. The default is the level, bit_length(t XOR s); see `loglinear.fenwick`. If every lambda is 1,
this is the linear model.
"""

# B batch, T time, G query/key groups, H value heads, K key, V value, L levels, N sequences
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.ops import impl_triton
from loglinear.ops.announcement import announce
from loglinear.ops.impl_reference import run as run_reference
from loglinear.ops.impl_torch import run as run_torch
from loglinear.ops.problem import Problem, unit_length
from loglinear.ops.state import FenwickState
from loglinear.ops.validation import flag, one_of
from loglinear.partition import FENWICK, Partition


class LogLinearOutput(NamedTuple):
    """The result of an operator."""

    output: Tensor
    """[B, T, H, V] in v's dtype."""
    final_state: FenwickState | None
    """The state after the last token, in float32 (float64 for float64 inputs); None without output_final_state=True."""


Implementation = Callable[[Problem], tuple[Tensor, "FenwickState | None"]]
_RUN: dict[str, Implementation] = {"triton": impl_triton.run, "torch": run_torch, "reference": run_reference}
IMPLEMENTATIONS = tuple(_RUN)


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
    partition: Partition = FENWICK,
    impl: str = "auto",
) -> LogLinearOutput:
    """Return log-linear attention with a gate (linear attention, RetNet, simple GLA, Mamba-2; GLA).

        S_t = Diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,    o_t = sum_l level_scales[t, l] * scale * q_t^T S_t^(l)

    The gate is scalar, with one decay for all channels of a head's keys, or diagonal, with a decay for each channel.

    NaN is not refused, nor is an infinity except in log_decay. Such a value in q or level_scales reaches the output of
    its own token alone. In k, v or log_decay the value reaches every later output and the final state of its heads: no
    reset removes it. Other heads and sequences keep their values. impl="torch" may also lose the outputs of earlier
    tokens in the same chunk, and impl="triton" may lose more.

    Args:
        q: [B, T, G, K], the queries. Value head h reads group h // (H / G).
        k: [B, T, G, K], the keys.
        v: [B, T, H, V], the values; H is a multiple of G.
        log_decay: [B, T, H] (a scalar gate) or [B, T, H, K] (a diagonal gate), natural logarithms, <= 0; None for no
            decay. A value below -80 counts as -80 (a full reset). A value above 0 is refused on the CPU. A GPU's values
            are not read, nor those of a traced tensor. A state keeps its kind of gate.
        level_scales: [B, T, H, L], the lambdas. Levels are capped at L - 1, so every T works with every L >= 1. L = 1
            is the linear model times one lambda.
        scale: The factor of q.
        initial_state: The state to continue from, one row per sequence, at any position; None starts new sequences.
            Its dtype is that of the final_state of these inputs. A `DecodeState.fenwick` may change before the backward
            pass, which uses a copy. Inside torch.utils.checkpoint it may not: the backward pass reads it again.
        output_final_state: True to also return the state after the last token.
        cu_seqlens: [N + 1] integers from 0 to T, non-decreasing: the boundaries of packed sequences (B = 1). Each
            sequence has its own tree.
        chunk_size: Tokens per chunk, a power of two up to 4096. It changes the speed and the layout of a state, but
            no result. Other partitions take the size of block next to it.
        partition: The rule that assigns past tokens to the columns of level_scales. The default is the published one,
            index(t, s) = bit_length(t XOR s). A state serves the partition that it was made with. triton supports a
            radix up to 64 without a largest block, where a block of 16 to 64 tokens can be its chunk.
        impl: "auto", "triton" (the Fenwick-array algorithm on a GPU), "torch" (the same algorithm on any device) or
            "reference" (token by token). "auto" chooses triton on a GPU if it supports the call, and torch otherwise
            or for one token after a state. No GPU has checked all of triton's kernels of diagonal gates, so "auto"
            leaves them out. triton continues states at positions below 65,536 chunks. At later positions its check on
            the device ends the process: use torch there.

    Returns:
        `LogLinearOutput(output, final_state)`: output is [B, T, H, V] in v's dtype. final_state is None without
            output_final_state=True; it is float32 (float64 for float64 inputs). torch computes 16-bit inputs in
            float32. triton accumulates in float32. It multiplies bfloat16 inputs and block states in bfloat16, float16
            ones in tf32, and float32 ones as three tf32 products.

    Raises:
        ValueError: A shape, dtype, state or cu_seqlens does not fit, or impl does not support the call. The message
            names the argument, its value and the expected one.

    Source: arXiv 2506.04761, equations 4 to 6; Yang, Wang, Shen, Panda, Kim, arXiv 2312.06635 (the linear GLA). Capped
    levels are this library's, and so is the log-linear model of a diagonal gate.
    """
    call = Problem(
        q,
        k,
        v,
        log_decay,
        None,
        level_scales,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        chunk_size,
        partition,
    )
    one_of("impl", impl, ["auto", *IMPLEMENTATIONS])
    return _run("log_linear_attention", call.checked(delta_rule=False), impl)


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
    partition: Partition = FENWICK,
    impl: str = "auto",
) -> LogLinearOutput:
    """Return log-linear attention with the delta rule (DeltaNet, Gated DeltaNet; Kimi Delta Attention).

        S_t = (I - beta_t k_t k_t^T) Diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T
        o_t = sum_l level_scales[t, l] * scale * q_t^T S_t^(l)

    The gate is scalar (Gated DeltaNet) or diagonal (Kimi Delta Attention), as in `log_linear_attention`.

    NaN and infinities reach the outputs that `log_linear_attention` names. One in beta acts as one in k does.

    Args:
        q: [B, T, G, K], the queries. Value head h reads group h // (H / G).
        k: [B, T, G, K], the keys.
        v: [B, T, H, V], the values; H is a multiple of G.
        log_decay: [B, T, H] (a scalar gate) or [B, T, H, K] (a diagonal gate), natural logarithms, <= 0; None for no
            decay. A value below -80 counts as -80 (a full reset). A value above 0 is refused on the CPU. A GPU's values
            are not read, nor those of a traced tensor. A state keeps its kind of gate.
        beta: [B, T, H], the write strength. States stay bounded if 0 <= beta * |k|^2 <= 2, so use unit keys.
        level_scales: [B, T, H, L], the lambdas, with levels capped at L - 1.
        scale: The factor of q.
        l2_normalize: True to first scale q and k to length 1, x / sqrt(|x|^2 + 1e-6), as Gated DeltaNet does.
        initial_state: The state to continue from, one row per sequence, at any position; None starts new sequences.
            Its dtype is that of the final_state of these inputs. A `DecodeState.fenwick` may change before the backward
            pass, which uses a copy. Inside torch.utils.checkpoint it may not: the backward pass reads it again.
        output_final_state: True to also return the state after the last token.
        cu_seqlens: [N + 1] integers from 0 to T, non-decreasing: the boundaries of packed sequences (B = 1). Each
            sequence has its own tree.
        chunk_size: Tokens per chunk, a power of two up to 4096. It changes the speed and the layout of a state, but
            no result. Other partitions take the size of block next to it.
        partition: The rule that assigns past tokens to the columns of level_scales, as in `log_linear_attention`.
        impl: "auto", "triton", "torch" or "reference", as in `log_linear_attention`.

    Returns:
        `LogLinearOutput(output, final_state)`, as `log_linear_attention` does.

    Raises:
        ValueError: An argument does not fit, or impl does not support the call, as in `log_linear_attention`.

    Source: arXiv 2506.04761, equation 8; Yang, Kautz, Hatamizadeh, arXiv 2412.06464 (the linear Gated DeltaNet);
        Kimi Team, arXiv 2510.26692 (the linear Kimi Delta Attention).
    """
    call = Problem(
        q,
        k,
        v,
        log_decay,
        beta,
        level_scales,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        chunk_size,
        partition,
    )
    one_of("impl", impl, ["auto", *IMPLEMENTATIONS])
    call = call.checked(delta_rule=True)
    if flag("l2_normalize", l2_normalize):
        call = replace(call, q=unit_length(call.q), k=unit_length(call.k))
    return _run("log_linear_delta_rule", call, impl)


def _run(operator: str, call: Problem, impl: str) -> LogLinearOutput:
    chosen, reason = _automatic(call) if impl == "auto" else (impl, None)
    announce(operator, chosen, reason)
    with torch.autocast(call.v.device.type, enabled=False):  # autocast would break the promise of float32 sums
        output, final_state = _RUN[chosen](call)
    return LogLinearOutput(output.to(call.v.dtype), final_state)


def _automatic(problem: Problem) -> tuple[str, str | None]:
    """Return the implementation that "auto" chooses, and the reason why it is not triton on a GPU."""
    # One token does not fill a chunk: kernels for chunks cost more than they save.
    is_step = problem.initial_state is not None and problem.v.shape[1] == 1
    if problem.v.device.type != "cuda" or is_step:
        return "torch", None
    reason = impl_triton.unchosen(problem)
    return ("triton", None) if reason is None else ("torch", reason)
