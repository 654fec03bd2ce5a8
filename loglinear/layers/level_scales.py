# B batch, T time, D hidden size, H heads, L levels, l levels with a lambda of their own
"""lambda: how strongly each token reads each level of its past."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loglinear.fenwick import log2
from loglinear.variants.base import Undecayed, at_least_float32

LambdaForm = Literal["softplus", "bounded", "unit"]


def check_lambda_form(form: str) -> None:
    """ValueError unless it is one of `LambdaForm`."""
    if form not in get_args(LambdaForm):
        raise ValueError(f"lambda_form must be one of {', '.join(get_args(LambdaForm))}, got {form!r}")


def check_finest_block(finest_block: int, num_levels: int) -> None:
    """ValueError unless it is a power of two that leaves two different lambdas."""
    if (
        finest_block < 1
        or finest_block & (finest_block - 1)
        or (finest_block > 1 and num_levels - log2(finest_block) < 2)
    ):
        raise ValueError(
            f"finest_block must be a power of two of at most 2**(num_levels - 2) tokens, got {finest_block} "
            f"with {num_levels} levels"
        )


class LevelScales(Undecayed, nn.Linear):
    """lambda [B, T, H, L] >= 0 of hidden states x [B, T, D], in float32 (float64 for a float64 model).

    form="softplus"  softplus(L * W x), L [H, L] starts at ones: as published (arXiv 2506.04761, section 3.4)
    form="bounded"   exp(-exp(L) * softplus(W x)), in (0, 1): the authors' alternative
    form="unit"      1 + elu(W x + b), W and b start at zero: exactly 1, so the model starts as its linear twin

    W and b are `weight` [H l, D] and `bias` [H l] of the Linear layer that this is. Tokens of one aligned block of
    `finest_block` tokens, a power of two, have one lambda: their levels, up to log2 of it, share its first column. So
    l = L - log2(finest_block), and L with the published hierarchy, whose finest block is 1 token.
    """

    no_weight_decay = ("L", "bias")

    def __init__(
        self, hidden_size: int, num_heads: int, num_levels: int, form: str = "unit", finest_block: int = 1
    ) -> None:
        check_lambda_form(form)
        if num_levels < 2:
            raise ValueError(f"num_levels must be at least 2 (with one level lambda is 1), got {num_levels}")
        check_finest_block(finest_block, num_levels)
        self.shared = log2(finest_block)  # levels that have the lambda of the next one
        super().__init__(hidden_size, num_heads * (num_levels - self.shared), bias=form == "unit")
        self.form, self.shape = form, (num_heads, num_levels - self.shared)
        if form != "unit":
            self.L = nn.Parameter(torch.ones(self.shape))
        with torch.no_grad():
            for name, value in self.initial_values().items():
                self.get_parameter(name).copy_(value)

    def initial_values(self) -> dict[str, Tensor]:
        if self.form != "unit":
            return {"L": torch.ones(self.shape)}
        return {"weight": torch.zeros_like(self.weight), "bias": torch.zeros_like(self.bias)}

    def forward(self, x: Tensor) -> Tensor:
        scales = self._scales(at_least_float32(super().forward(x)).unflatten(-1, self.shape))
        return (
            torch.cat([scales[..., :1].expand(*scales.shape[:-1], self.shared), scales], -1) if self.shared else scales
        )

    def _scales(self, logits: Tensor) -> Tensor:
        if self.form == "softplus":
            return F.softplus(self.L * logits)
        if self.form == "bounded":
            return torch.exp(-torch.exp(at_least_float32(self.L)) * F.softplus(logits))
        return 1 + F.elu(logits)
