# B batch, T time, D hidden size, G query/key groups, H heads, K key, V value
"""What a base model brings to the one mixer: its gates, its operator and the conventions around it."""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class HeadBias(nn.Module):
    """Base of modules that hold one value for each head: float32 also in a 16-bit model, never decayed.

    Such a module holds nothing else and is called where its values are used: FSDP shards parameters of one dtype
    together, and offloading fetches parameters for their module's `forward`. Its name in the model contains "bias",
    by which transformers' Trainer and others exempt parameters from weight decay.
    """


class GateBias(HeadBias):
    """Time steps and log decay, both [B, T, H], of gate logits [B, T, H]:

        dt = softplus(gate + dt_bias),    log_decay = -exp(A_log) dt

    At the start the rates exp(A_log) are uniform in [1, 16] (Mamba-2) and the time steps softplus(dt_bias) are
    log-uniform in [1e-3, 1e-1] (Mamba, arXiv 2312.00752, section 3.6).
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        start = self.initial_values()
        self.A_log, self.dt_bias = nn.Parameter(start["A_log"]), nn.Parameter(start["dt_bias"])

    def initial_values(self) -> dict[str, Tensor]:
        rate = torch.empty(self.num_heads).uniform_(1.0, 16.0)
        time_step = torch.empty(self.num_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        inverse_softplus = time_step + torch.log(-torch.expm1(-time_step))
        return {"A_log": rate.log_(), "dt_bias": inverse_softplus}

    def forward(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        time_step = F.softplus(gate + self.dt_bias)
        return time_step, -at_least_float32(self.A_log).exp() * time_step


class SkipBias(HeadBias):
    """y + D v for the operator's output y and its values v, both [B, T, H, V]; D [H] starts at ones."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.D = nn.Parameter(torch.ones(num_heads))

    def initial_values(self) -> dict[str, Tensor]:
        return {"D": torch.ones(self.num_heads)}

    def forward(self, y: Tensor, v: Tensor) -> Tensor:
        return y + (self.D.unsqueeze(-1) * v).to(y.dtype)


class Variant(nn.Module):
    """Base of all variants. A subclass states its equation, sets the class attributes and defines `forward`.

    `forward(x_BTD, q_BTGK, k_BTGK, v_BTHV) -> Operands` turns the mixer's hidden states (of the block's input, not
    convolved) and its convolved q, k, v into the operands of the operator of `transition`. Parameters of the heads
    belong to a `HeadBias`.
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
        self.skip_bias: SkipBias | None = None  # what bypasses the operator

    @property
    def scale(self) -> float:
        """What the operator multiplies q with."""
        return self.heads.key_dim**-0.5

    def gate_logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """`gates_per_head` tensors [B, T, H], never in 16 bits."""
        return at_least_float32(self.gates(x)).chunk(self.gates_per_head, dim=-1)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        return Operands(q, k, v, None)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
