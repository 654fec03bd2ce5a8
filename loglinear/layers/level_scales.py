# B batch, T time, D hidden size, H heads, L levels
"""lambda: how strongly each token reads each level of its past."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loglinear.variants.base import Undecayed, at_least_float32

LambdaForm = Literal["softplus", "bounded", "unit"]


def check_lambda_form(form: str) -> None:
    """ValueError unless it is one of `LambdaForm`."""
    if form not in get_args(LambdaForm):
        raise ValueError(f"lambda_form must be one of {', '.join(get_args(LambdaForm))}, got {form!r}")


class LevelScales(Undecayed, nn.Linear):
    """lambda [B, T, H, L] >= 0 of hidden states x [B, T, D], in float32 (float64 for a float64 model).

    form="softplus"  softplus(L * W x), L [H, L] starts at ones: as published (arXiv 2506.04761, section 3.4)
    form="bounded"   exp(-exp(L) * softplus(W x)), in (0, 1): the authors' alternative
    form="unit"      1 + elu(W x + b), W and b start at zero: exactly 1, so the model starts as its linear twin

    W and b are `weight` [H L, D] and `bias` [H L] of the Linear layer that this is.
    """

    no_weight_decay = ("L", "bias")

    def __init__(self, hidden_size: int, num_heads: int, num_levels: int, form: str = "softplus") -> None:
        check_lambda_form(form)
        if num_levels < 2:
            raise ValueError(f"num_levels must be at least 2 (with one level lambda is 1), got {num_levels}")
        super().__init__(hidden_size, num_heads * num_levels, bias=form == "unit")
        self.form, self.shape = form, (num_heads, num_levels)
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
        logits = at_least_float32(super().forward(x)).unflatten(-1, self.shape)
        if self.form == "softplus":
            return F.softplus(self.L * logits)
        if self.form == "bounded":
            return torch.exp(-torch.exp(at_least_float32(self.L)) * F.softplus(logits))
        return 1 + F.elu(logits)
