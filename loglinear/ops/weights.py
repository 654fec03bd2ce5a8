"""The weights of the routed read, from the logits of the tokens and the scores of the buckets."""

# B batch, T time, G query/key groups, H heads, L columns
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loglinear.kernels.torch import routed_weights as plain
from loglinear.ops import impl_triton
from loglinear.ops.announcement import announce
from loglinear.ops.problem import is_transformed
from loglinear.ops.scores import SCORES
from loglinear.ops.validation import (
    INTEGERS,
    Sizes,
    check_groups,
    check_tensor,
    finite_number,
    one_of,
    working_dtype,
)


def routed_weights(
    logits: Tensor,
    scores: Tensor,
    tokens: Tensor,
    tau: Tensor,
    *,
    sharpness: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Return the weights with which a routed read reads its buckets.

        a[t, b] = logits[t, b] + sharpness tau score(t, b),    w[t, b] = n_t softmax_b a[t, b]

    n_t is the number of buckets that hold a token. Over these the weights have mean one; empty buckets have the weight
    0. If all a of a token are equal, its weights are exactly 1. The operators take w as their level_scales.

    Args:
        logits: [B, T, H, L].
        scores: [B, T, G, L], of `bucket_scores`. Each group serves H / G neighbouring heads.
        tokens: [B or 1, T, L], the tokens of the buckets, of `bucket_scores`. Each token has at least one bucket that
            is not empty, because it sees itself.
        tau: [H], the factor of the scores in each head.
        sharpness: A factor of all tau.
        impl: "auto", "triton" (one launch for a GPU, and one for the gradients), "torch" or "reference" (both are the
            formula in plain torch, on any device). One of their tests waits for a GPU. Until then
            "auto" chooses torch, and a log line says why.

    Returns:
        [B, T, H, L] in float32 (float64 if an input is float64), with the gradients of logits, scores and tau.

    Raises:
        ValueError: A shape or dtype does not fit, or impl="triton" does not support the call. The message names the
            argument.

    Source: this library; see docs/learn/routed-reads.md.
    """
    one_of("impl of routed_weights", impl, SCORES)
    sharpness = finite_number("sharpness", sharpness)
    _check(logits, scores, tokens, tau)
    is_on_gpu = logits.device.type == "cuda"
    reason = _unsupported(logits, scores, tau) if impl == "triton" or (impl == "auto" and is_on_gpu) else None
    if impl == "triton" and reason is not None:
        raise ValueError(reason)
    if impl == "auto" and is_on_gpu and reason is None:
        reason = _untried()
    chosen = ("triton" if reason is None and is_on_gpu else "torch") if impl == "auto" else impl
    announce("routed_weights", chosen, reason)
    with torch.autocast(logits.device.type, enabled=False):
        if chosen != "triton":
            return plain(logits, scores, tokens, tau, sharpness)
        from loglinear.kernels.triton import routed_weights as kernel

        return kernel(logits, scores.float(), tokens, tau.float(), sharpness)


def _check(logits: Any, scores: Any, tokens: Any, tau: Any) -> None:
    """Raise ValueError unless the tensors fit one another."""
    sizes: Sizes = {}
    check_tensor("logits", logits, "BTHL", sizes)
    check_tensor("scores", scores, "BTGL", sizes, logits.device)
    check_tensor("tokens", tokens, "nTL", sizes, logits.device, INTEGERS)
    check_tensor("tau", tau, "H", sizes, logits.device)
    if sizes["n"] not in (1, sizes["B"]):
        raise ValueError(f"tokens must have shape [B or 1, T, L] with B = {sizes['B']}, got {list(tokens.shape)}")
    check_groups("logits", sizes["H"], sizes["G"])


def _unsupported(logits: Tensor, scores: Tensor, tau: Tensor) -> str | None:
    """Return the reason why the kernels do not support a call; None if they support it."""
    reason = impl_triton.unavailable(logits.device)
    if reason is not None:
        return reason
    if working_dtype((logits, scores, tau)) == torch.float64:
        return "float64 needs impl='torch'"
    if is_transformed():
        return "torch.func transforms and forward-mode derivatives need impl='torch'"
    from loglinear.kernels.triton import limits

    return limits.of_weights(scores)


def _untried() -> str | None:
    """Return why "auto" does not choose the kernels."""
    from loglinear.kernels.triton import limits

    return None if limits.WEIGHTS_PASSED_ON_A_GPU else "a GPU has not passed all tests of the kernels of the weights"
