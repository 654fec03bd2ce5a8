"""Calls of `routed_weights` for the tests of its kernels: weights and every gradient, by name, beside float64."""

# B batch, T time, G groups, R heads of a group, L columns
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.ops import bucket_tokens, routed_weights
from loglinear.partition import Partition
from tests.ops.operators import excess, relative_error

SHARPNESS = 4.0
FACTOR = 4  # times the error of impl="torch" in float32; 0.74 in the interpreter. A GPU's exponential is less exact.
NAMES = ("logits", "scores", "tau")


class Sizes(NamedTuple):
    B: int = 1
    T: int = 63
    G: int = 1
    R: int = 3
    L: int = 5


# Every length with every number of columns; groups; heads that fill no tile; more numbers than a turn has.
SIZES = [Sizes(T=T, L=L) for T in (1, 63, 130) for L in (2, 5, 19, 60)]
SIZES += [Sizes(2, 63, G, R, 19) for G, R in ((1, 1), (5, 1), (3, 2), (2, 7), (1, 48), (1, 9))]
SIZES += [Sizes(T=9, R=40, L=60), Sizes(T=3, R=2, L=3000), Sizes(2, 130, 2, 16, 16)]


def make(s: Sizes, dtype=torch.float32, *, device="cpu", size=2.0, seed=0) -> dict[str, Tensor]:
    """Logits of `dtype`, scores from 0 to several matches, tau of both signs, and the tokens of a radix-4 partition."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    tokens = bucket_tokens(torch.arange(s.T, device=device)[None], num_columns=s.L, partition=Partition(4, 2))
    return {
        "logits": (size * normal(s.B, s.T, s.G * s.R, s.L)).to(dtype),
        "scores": normal(s.B, s.T, s.G, s.L).square(),
        "tokens": tokens,
        "tau": normal(s.G * s.R),
    }


def packed(s: Sizes, device="cpu") -> Tensor:
    """The tokens of packed sequences, one of which starts at a position of its own: buckets at both ends are empty."""
    position = torch.arange(s.T, device=device) % 29 + 100
    first = torch.where(torch.arange(s.T, device=device) < 29, 0, 100)
    return bucket_tokens(position[None], num_columns=s.L, partition=Partition(4, 4), first=first[None])


def results_of(x: dict[str, Tensor], impl: str, dtype: torch.dtype | None, dweights: Tensor) -> dict[str, Tensor]:
    """The weights and every gradient, by name; None leaves the inputs' dtypes."""
    leaves = {name: x[name].detach().to(dtype or x[name].dtype).requires_grad_() for name in NAMES}
    w = routed_weights(**x | leaves, sharpness=SHARPNESS, impl=impl)
    grads = torch.autograd.grad(w, list(leaves.values()), dweights.to(w.dtype))
    return {"weights": w.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}


def terms(x: dict[str, Tensor], w: Tensor, dweights: Tensor) -> dict[str, float]:
    """The norms of the terms whose differences the gradients are."""
    wide = {name: x[name].double() for name in NAMES}
    da = (w * dweights).unflatten(2, (x["scores"].shape[2], -1))
    by_tau = SHARPNESS * da * wide["tau"].view(*da.shape[2:4], 1)
    by_score = SHARPNESS * da * wide["scores"].unsqueeze(3)
    found = zip(NAMES, (da, by_tau, by_score), strict=True)
    return {f"gradient of {name}": float(term.norm()) for name, term in found}


def check(x: dict[str, Tensor], impl: str = "triton", seed: int = 1) -> dict[str, Tensor]:
    """Assert that weights and gradients are those of float64, and return them. 16-bit logits are those numbers.

    Their gradient is rounded to 16 bits; all other results are as exact as in float32.
    """
    generator = torch.Generator(x["logits"].device).manual_seed(seed)
    dweights = torch.randn(x["logits"].shape, generator=generator, device=x["logits"].device)
    exact = results_of(x, "torch", torch.float64, dweights)
    twin, actual = results_of(x, "torch", torch.float32, dweights), results_of(x, impl, None, dweights)
    sizes = terms(x, exact["weights"], dweights.double())
    assert not actual["weights"][(x["tokens"] == 0)[:, :, None].expand_as(actual["weights"])].any()
    for name, e in exact.items():
        assert actual[name].isfinite().all(), name
        if actual[name].dtype in (torch.float16, torch.bfloat16):
            assert relative_error(actual[name], e) <= torch.finfo(actual[name].dtype).eps / 2, name
        else:
            times = excess(actual[name], twin[name], e, sizes.get(name, 0.0))
            assert times <= FACTOR, (name, times, relative_error(actual[name], e))
    return actual
