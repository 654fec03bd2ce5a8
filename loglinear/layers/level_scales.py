# B batch, T time, D hidden size, H heads, L levels, l levels with a lambda of their own
"""The layer of lambda, the level scales: the weights with which each token reads its levels."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loglinear.fenwick import log2
from loglinear.variants.base import HeadBias, at_least_float32

LambdaForm = Literal["softplus", "bounded", "unit"]


def check_lambda_form(form: str) -> None:
    """Raise ValueError unless `form` is one of `LambdaForm`."""
    if form not in get_args(LambdaForm):
        raise ValueError(f"lambda_form must be one of {', '.join(get_args(LambdaForm))}, got {form!r}")


def check_finest_block(finest_block: int, num_levels: int) -> None:
    """Raise ValueError unless `finest_block` is a power of two that leaves two different lambdas."""
    if (
        finest_block < 1
        or finest_block & (finest_block - 1)
        or (finest_block > 1 and num_levels - log2(finest_block) < 2)
    ):
        raise ValueError(
            f"finest_block must be a power of two of at most 2**(num_levels - 2) tokens, got {finest_block} "
            f"with {num_levels} levels"
        )


def _softplus(logits: Tensor, L: Tensor) -> Tensor:
    return F.softplus(L * logits)


def _bounded(logits: Tensor, L: Tensor) -> Tensor:
    return torch.exp(-torch.exp(L) * F.softplus(logits))


def _unit(logits: Tensor, L: None) -> Tensor:
    return 1 + F.elu(logits)


_FORMS: dict[str, Callable[..., Tensor]] = {"softplus": _softplus, "bounded": _bounded, "unit": _unit}


class ZeroLinear(nn.Linear):
    """A linear layer whose weight and bias start at zero. Its dtype may be wider than that of its input."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # draws as any linear layer does, so that a seed still makes the same model
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def initial_values(self) -> dict[str, Tensor]:
        return {"weight": torch.zeros_like(self.weight), "bias": torch.zeros_like(self.bias)}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype)))


class LevelBias(HeadBias):
    """The map from logits to lambda, both [B, T, H, l], in one of the forms.

    L [H, l] starts at ones; the form "unit" has none.
    """

    def __init__(self, shape: tuple[int, int], form: str) -> None:
        super().__init__()
        self.shape, self.form = shape, form
        self.L = None if form == "unit" else nn.Parameter(torch.ones(shape))

    def initial_values(self) -> dict[str, Tensor]:
        return {} if self.L is None else {"L": torch.ones(self.shape)}

    def forward(self, logits: Tensor) -> Tensor:
        return _FORMS[self.form](logits, None if self.L is None else at_least_float32(self.L))


class LevelScales(nn.Module):
    """Lambda [B, T, H, L] >= 0 from hidden states x [B, T, D], in float32 (float64 for a float64 model).

        softplus   softplus(L * W x), L [H, l] starts at ones: as published (arXiv 2506.04761, section 3.4)
        bounded    exp(-exp(L) * softplus(W x)), in (0, 1): the authors' alternative
        unit       1 + elu(W x + b), W and b start at zero: exactly 1, so the model starts as the linear model

    The layer `proj` holds W [H l, D] and b [H l], and `level_bias` holds L. The lowest log2(finest_block) + 1 levels
    share one lambda, so l = L - log2(finest_block). The published hierarchy has a finest block of 1 token and l = L.

    Args:
        hidden_size: D.
        num_heads: H.
        num_levels: L, at least 2.
        form: "softplus", "bounded" or "unit".
        finest_block: A power of two. The tokens of each aligned block of this size share one lambda.

    Raises:
        ValueError: An unknown form, fewer than 2 levels, or a finest_block that leaves fewer than 2 lambdas.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_levels: int, form: str = "unit", finest_block: int = 1
    ) -> None:
        super().__init__()
        check_lambda_form(form)
        if num_levels < 2:
            raise ValueError(f"num_levels must be at least 2 (with one level lambda is 1), got {num_levels}")
        check_finest_block(finest_block, num_levels)
        self.shared = log2(finest_block)  # levels that share the lambda of the next one
        self.shape = (num_heads, num_levels - self.shared)
        width = math.prod(self.shape)
        self.proj = ZeroLinear(hidden_size, width) if form == "unit" else nn.Linear(hidden_size, width, bias=False)
        self.level_bias = LevelBias(self.shape, form)

    def forward(self, x: Tensor) -> Tensor:
        scales = self.level_bias(at_least_float32(self.proj(x)).unflatten(-1, self.shape))
        if not self.shared:
            return scales
        return torch.cat([scales[..., :1].expand(*scales.shape[:-1], self.shared), scales], -1)
