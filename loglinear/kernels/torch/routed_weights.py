"""The weights of the routed read, and their gradients, in plain torch.

    a[t, b] = logits[t, b] + sharpness tau score(t, b),    w[t, b] = n_t softmax_b a[t, b]

n_t is the number of buckets that hold a token; the weights of the others are 0. With the gradient dw of w:

    da = w (dw - sum_b w dw / n_t),    dlogits = da
    dscore = sharpness sum over the heads of a group of tau da,    dtau = sharpness sum over t and b of score da
"""

# B batch, T time, G query/key groups, H heads, L columns
from __future__ import annotations

import torch
from torch import Tensor


def routed_weights(logits: Tensor, scores: Tensor, tokens: Tensor, tau: Tensor, sharpness: float) -> Tensor:
    """Return w [B,T,H,L] from logits [B,T,H,L], scores [B,T,G,L], tokens [B or 1,T,L] and tau [H]; at least float32."""
    a = at_least_float32(logits) + (scores.unsqueeze(3) * factors(tau, sharpness, scores)).flatten(2, 3)
    live = (tokens > 0).unsqueeze(2)
    a = a.masked_fill(~live, -torch.inf)
    weights = (a - a.amax(-1, keepdim=True).detach()).exp()
    # A softmax times n would round 1 / n, and equal numbers must give exactly 1.
    return weights * (live.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True))


def routed_weights_gradients(
    dweights: Tensor, weights: Tensor, scores: Tensor, tau: Tensor, sharpness: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return da [B,T,H,L], dscores [B,T,G,L] and dtau [H]. Autograd can record this, and `weights` if it made them."""
    count = weights.detach().sum(-1, keepdim=True)
    da = weights * (dweights - (weights * dweights).sum(-1, keepdim=True) / count)
    by_group = da.unflatten(2, (scores.shape[2], -1))
    dscores = (by_group * factors(tau, sharpness, scores)).sum(3)
    return da, dscores, sharpness * (by_group * scores.unsqueeze(3)).sum((0, 1, 4)).flatten()


def factors(tau: Tensor, sharpness: float, scores: Tensor) -> Tensor:
    """Return sharpness tau as [G, heads of a group, 1]."""
    return (sharpness * at_least_float32(tau)).view(scores.shape[2], -1, 1)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
