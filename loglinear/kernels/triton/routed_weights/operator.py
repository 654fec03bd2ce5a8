"""The weights as torch sees them: one registered node with a fake and an autograd formula. It never waits.

It saves no logits: its backward starts from the weights, which the operator that takes them saves too.
"""

# B batch, T time, G groups, H heads, L columns
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loglinear.kernels.torch.routed_weights import routed_weights_gradients
from loglinear.kernels.triton.routed_weights.backward import gradients
from loglinear.kernels.triton.routed_weights.forward import forward


@torch.library.custom_op("loglinear::routed_weights", mutates_args=())
def routed_weights(logits: Tensor, scores: Tensor, tokens: Tensor, tau: Tensor, sharpness: float) -> Tensor:
    """Return the weights [B,T,H,L] in float32.

    logits [B,T,H,L] of 16 or 32 bits; scores [B,T,G,L] and tau [H] in float32; tokens [B or 1,T,L], integers.
    """
    return forward(logits.contiguous(), scores.contiguous(), tokens.contiguous(), tau.contiguous(), sharpness)


@routed_weights.register_fake
def _(logits, scores, tokens, tau, sharpness):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape, dtype=torch.float32)


@torch.library.custom_op("loglinear::routed_weights_backward", mutates_args=())
def routed_weights_backward(
    dweights: Tensor, weights: Tensor, scores: Tensor, tau: Tensor, sharpness: float, dtype: torch.dtype
) -> list[Tensor]:
    """Return the gradients of logits, in their `dtype`, of scores and of tau."""
    dweights, weights, scores, tau = (x.contiguous() for x in (dweights, weights, scores, tau))
    return gradients(dweights, weights, scores, tau, sharpness, dtype)


@routed_weights_backward.register_fake
def _(dweights, weights, scores, tau, sharpness, dtype):  # type: ignore[no-untyped-def]
    return [weights.new_empty(weights.shape, dtype=dtype), scores.new_empty(scores.shape), tau.new_empty(tau.shape)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, scores, _, tau, sharpness = inputs
    ctx.save_for_backward(output, scores, tau)
    ctx.options = sharpness, logits.dtype


def _backward(ctx: Any, dweights: Tensor):  # type: ignore[no-untyped-def]
    weights, scores, tau = ctx.saved_tensors  # once: checkpointing refuses to give them twice
    sharpness, dtype = ctx.options
    if torch.is_grad_enabled():  # create_graph=True
        with torch.autocast(dweights.device.type, enabled=False):
            dlogits, dscores, dtau = routed_weights_gradients(dweights, weights, scores, tau, sharpness)
        return dlogits.to(dtype), dscores, None, dtau, None
    dlogits, dscores, dtau = routed_weights_backward(dweights, weights, scores, tau, sharpness, dtype)
    return dlogits, dscores, None, dtau, None


routed_weights.register_autograd(_backward, setup_context=_save)
