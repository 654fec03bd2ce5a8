"""The gradients, from the weights w and their gradient dw.

An empty bucket has w = 0, and so da = 0.

    da[p, r, l]  = w (dw - sum over l of w dw / n_p),    n_p = sum over l of w
    dscore[p, l] = sharpness sum over r of tau_r da[p, r, l]
    dtau[p, r]   = sharpness sum over l of score[p, l] da[p, r, l],    then the sum over tokens
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
@triton.jit(do_not_specialize=["P", "G", "R"])
def routed_weights_backward_kernel(
    dweights,
    weights,
    scores,
    tau,
    dlogits,
    dscores,
    dtau,
    sharpness,
    P,
    G,
    R,
    L,
    BP: tl.constexpr,
    BR: tl.constexpr,
    BL: tl.constexpr,
):
    """Write dlogits [pairs, R, L], dscores [pairs, L] and each pair's part of dtau [pairs, R]."""
    first, i, is_pair = pairs_of_program(P, BP)
    l, group = tl.arange(0, BL), (first + i) % G
    is_column, place_PL = (l < L)[None, :], (i * L)[:, None] + l[None, :]
    start_of_pairs = first.to(tl.int64) * L
    score_PL = tl.load(scores + start_of_pairs + place_PL, mask=is_column, other=0.0)
    dscore_PL = tl.zeros([BP, BL], tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        place, is_there = places(i, r, l, R, L)
        w = tl.load(weights + start_of_pairs * R + place, mask=is_there, other=0.0)
        dw = tl.load(dweights + start_of_pairs * R + place, mask=is_there, other=0.0)
        count_PR = tl.maximum(tl.sum(w, 2), 1.0)  # heads that are not there have the sum 0
        da = w * (dw - (tl.sum(w * dw, 2) / count_PR)[:, :, None])
        tl.store(dlogits + start_of_pairs * R + place, da, mask=is_there & is_pair[:, None, None])
        dscore_PL += tl.sum(da * load_factors(tau, group, r, R, sharpness)[:, :, None], 1)
        dtau_PR = sharpness * tl.sum(da * score_PL[:, None, :], 2)
        tl.store(
            dtau + first.to(tl.int64) * R + (i * R)[:, None] + r[None, :],
            dtau_PR,
            mask=is_pair[:, None] & (r < R)[None, :],
        )
    tl.store(dscores + start_of_pairs + place_PL, dscore_PL, mask=is_pair[:, None] & is_column)


def gradients(
    dweights: Tensor, weights: Tensor, scores: Tensor, tau: Tensor, sharpness: float, dtype: torch.dtype
) -> list[Tensor]:
    """Return dlogits [B,T,H,L] in `dtype`, dscores [B,T,G,L] and dtau [H]; all tensors are contiguous."""
    shares, H = Shares.of(weights, scores), weights.shape[2]
    dlogits, dscores = torch.empty_like(weights, dtype=dtype), torch.empty_like(scores)
    dtau = torch.empty(shares.pairs // shares.groups, H, dtype=torch.float32, device=tau.device)
    pairs, G, R, L = shares
    routed_weights_backward_kernel[shares.grid](
        dweights, weights, scores, tau, dlogits, dscores, dtau, sharpness, pairs, G, R, L, **shares.constants
    )
    return [dlogits, dscores, dtau.sum(0)]
