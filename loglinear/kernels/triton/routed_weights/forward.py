"""w[p, r, l] = n_p e[p, r, l] / sum over l of e[p, r, l],    e = exp(a - max over l of a)

    a[p, r, l] = logits[p, r, l] + sharpness tau_r score[p, l],    -inf in empty buckets

n_p is the number of buckets that hold a token. If all a are equal, every e is 1 and so is w, because the division is
rounded correctly.
"""

# B batch, T time, G groups, H heads, R heads of a group, L columns
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.routed_weights.tiles import Shares, load_factors, pairs_of_program, places


@launcher
@triton.jit(do_not_specialize=["P", "S", "G", "R"])
def routed_weights_kernel(
    logits,
    scores,
    tokens,
    tau,
    weights,
    sharpness,
    P,
    S,
    G,
    R,
    L,
    BP: tl.constexpr,
    BR: tl.constexpr,
    BL: tl.constexpr,
):
    """P pairs; S tokens have counts of their own, and all rows of the batch share them if S is T."""
    first, i, is_pair = pairs_of_program(P, BP)
    l, group = tl.arange(0, BL), (first + i) % G
    is_column = (l < L)[None, :]
    token = ((first + i) // G % S).to(tl.int64)
    live_PL = tl.load(tokens + (token * L)[:, None] + l[None, :], mask=is_column, other=0) > 0
    start_of_pairs = first.to(tl.int64) * L
    score_PL = tl.load(scores + start_of_pairs + (i * L)[:, None] + l[None, :], mask=is_column, other=0.0)
    count_P = tl.sum(live_PL.to(tl.float32), 1)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        place, is_there = places(i, r, l, R, L)
        a = tl.load(logits + start_of_pairs * R + place, mask=is_there, other=0.0).to(tl.float32)
        a += load_factors(tau, group, r, R, sharpness)[:, :, None] * score_PL[:, None, :]
        a = tl.where(live_PL[:, None, :], a, float("-inf"))
        e = tl.exp(a - tl.max(a, 2)[:, :, None])
        sum_PR = tl.sum(e, 2)
        w = e * tl.div_rn(tl.broadcast_to(count_P[:, None], sum_PR.shape), sum_PR)[:, :, None]
        tl.store(weights + start_of_pairs * R + place, w, mask=is_there & is_pair[:, None, None])


def forward(logits: Tensor, scores: Tensor, tokens: Tensor, tau: Tensor, sharpness: float) -> Tensor:
    """Return the weights [B,T,H,L] in float32; all tensors are contiguous."""
    shares, counts = Shares.of(logits, scores), tokens.shape[0] * tokens.shape[1]
    weights = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    pairs, G, R, L = shares
    routed_weights_kernel[shares.grid](
        logits, scores, tokens, tau, weights, sharpness, pairs, counts, G, R, L, **shares.constants
    )
    return weights
