# B batch, T time, D hidden size, G query/key groups, H heads, K key, V value
"""What a base model brings to the one mixer: its gates, its operator and the conventions around it."""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn


class Operands(NamedTuple):
    """What the operators of `loglinear.ops` take; gates are float32 (float64 for a float64 model)."""

    q: Tensor  # [B, T, G, K]
    k: Tensor  # [B, T, G, K]
    v: Tensor  # [B, T, H, V]
    log_decay: Tensor | None  # [B, T, H], <= 0; None: no decay
    beta: Tensor | None = None  # [B, T, H], delta rule only


class HeadSizes(NamedTuple):
    """Heads of one mixer: H, G, K and V of the operators."""

    num_heads: int
    num_groups: int
    key_dim: int
    head_dim: int

    def check(self) -> None:
        """ValueError, naming the size, where these cannot be the heads of a mixer."""
        for name, size in self._asdict().items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_heads must be a multiple of num_groups = {self.num_groups}, got {self.num_heads}")


class Undecayed(nn.Module):
    """Marks its parameters in `no_weight_decay` with `_no_weight_decay = True`, also when loading replaces them."""

    no_weight_decay: ClassVar[tuple[str, ...]] = ()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if param is not None and name in self.no_weight_decay:
            param._no_weight_decay = True  # type: ignore[attr-defined]
        super().register_parameter(name, param)


class Variant(Undecayed):
    """Base of all variants. A subclass states its equation, sets the class attributes and defines `forward`.

    `forward(x_BTD, q_BTGK, k_BTGK, v_BTHV) -> Operands` turns the mixer's hidden states (of the block's input, not
    convolved) and its convolved q, k, v into the operands of the operator of `transition`.
    """

    transition: ClassVar[Literal["scalar_gate", "delta_rule"]] = "scalar_gate"
    l2_normalize: ClassVar[bool] = False
    """does the operator bring q and k to length 1? (delta rule only)"""
    gates_per_head: ClassVar[int] = 0
    """how many gate logits each head gets from the hidden states"""
    conv_bias: ClassVar[bool] = False
    gate_before_norm: ClassVar[bool] = False
    """output norm: True `norm(y * silu(z))` over each group's heads together, False `norm(y) * silu(z)` per head"""
    paper_heads: ClassVar[HeadSizes]
    """the heads at the paper's hidden size of 1536"""

    def __init__(self, hidden_size: int, heads: HeadSizes) -> None:
        super().__init__()
        heads.check()
        self.heads = heads
        if self.gates_per_head:
            self.gates = nn.Linear(hidden_size, self.gates_per_head * heads.num_heads, bias=False)
        for name, value in self.initial_values().items():
            setattr(self, name, nn.Parameter(value))

    @property
    def scale(self) -> float:
        """What the operator multiplies q with."""
        return self.heads.key_dim**-0.5

    def gate_logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """`gates_per_head` tensors [B, T, H], never in 16 bits."""
        return at_least_float32(self.gates(x)).chunk(self.gates_per_head, dim=-1)

    def skip(self, output: Tensor, v: Tensor) -> Tensor:
        """Adds what bypasses the operator to its output [B, T, H, V]; v as it came from the convolution."""
        return output

    def initial_values(self) -> dict[str, Tensor]:
        """This module's own parameters, by name, as they start (Linear weights are the model's business)."""
        return {}

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        return Operands(q, k, v, None)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exponential_decay_rates(heads: int) -> Tensor:
    """A_log [H]: log of rates uniform in [1, 16] (Mamba-2)."""
    return torch.empty(heads).uniform_(1.0, 16.0).log_()


def inverse_softplus_time_steps(heads: int) -> Tensor:
    """dt_bias [H] such that softplus(dt_bias) is log-uniform in [1e-3, 1e-1] (Mamba, section 3.6)."""
    time_step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
    return time_step + torch.log(-torch.expm1(-time_step))
