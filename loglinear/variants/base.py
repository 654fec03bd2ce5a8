# B batch, T time, D hidden size, G query/key groups, H heads, K key, V value
"""The base of the variants: the gates, the operator and the conventions that a base model adds to the mixer."""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loglinear.ops.validation import whole_number

WIDE = (torch.float32, torch.float64)


class Operands(NamedTuple):
    """The operands of an operator of `loglinear.ops`; gates are float32 (float64 for a float64 model)."""

    q: Tensor
    """[B, T, G, K] Queries."""
    k: Tensor
    """[B, T, G, K] Keys."""
    v: Tensor
    """[B, T, H, V] Values."""
    log_decay: Tensor | None
    """[B, T, H] Log decays, <= 0, or [B, T, H, K] of a diagonal gate; None for no decay."""
    beta: Tensor | None = None
    """[B, T, H] Write strengths, for the delta rule only."""


class HeadSizes(NamedTuple):
    """The heads of one mixer."""

    num_heads: int
    """H, the value heads."""
    num_groups: int
    """G, the query/key groups."""
    key_dim: int
    """K, the width of a query or key."""
    head_dim: int
    """V, the width of a value."""

    def check(self) -> None:
        """Raise ValueError unless all sizes are integers of at least 1 and H is a multiple of G."""
        for name, size in self._asdict().items():
            whole_number(name, size)
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_heads must be a multiple of num_groups = {self.num_groups}, got {self.num_heads}")


class HeadBias(nn.Module):
    """The base of modules that hold one value per head: float32 even in a 16-bit model, without weight decay.

    Such a module holds no other parameters, because FSDP shards parameters of one dtype together. Its values are used
    in its own `forward`, because offloading fetches parameters for it. Its name in the model contains "bias", by which
    transformers' Trainer and other tools exempt parameters from weight decay.
    """


class GateBias(HeadBias):
    """The time step and log decay, both [B, T, H], from gate logits [B, T, H].

        dt = softplus(gate + dt_bias),    log_decay = -exp(A_log) dt

    At the start the rates exp(A_log) are uniform in [1, 16] (Mamba-2). The time steps softplus(dt_bias) are log-uniform
    in [1e-3, 1e-1] (Mamba, arXiv 2312.00752, section 3.6).
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        start = self.initial_values()
        self.A_log, self.dt_bias = nn.Parameter(start["A_log"]), nn.Parameter(start["dt_bias"])

    def initial_values(self) -> dict[str, Tensor]:
        return {"A_log": log_rates(self.num_heads), "dt_bias": time_step_bias(self.num_heads)}

    def forward(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        time_step = F.softplus(gate + self.dt_bias)
        return time_step, -at_least_float32(self.A_log).exp() * time_step


class DiagonalGateBias(HeadBias):
    """The log decay [B, T, H, K] of a diagonal gate, from gate logits [B, T, H, K].

        log_decay = -exp(A_log) softplus(gate + dt_bias)                        without a lower bound
        log_decay = lower_bound sigmoid(exp(A_log) (gate + dt_bias))            with one (the safe gate)

    At the start exp(A_log) [H] is as in `GateBias`, or 1 with a lower bound, and so is dt_bias [H, K].
    """

    def __init__(self, heads: HeadSizes, lower_bound: float | None) -> None:
        super().__init__()
        self.heads, self.lower_bound = heads, lower_bound
        start = self.initial_values()
        self.A_log, self.dt_bias = nn.Parameter(start["A_log"]), nn.Parameter(start["dt_bias"])

    def initial_values(self) -> dict[str, Tensor]:
        heads = self.heads.num_heads
        rates = log_rates(heads) if self.lower_bound is None else torch.zeros(heads)
        return {"A_log": rates, "dt_bias": time_step_bias(heads, self.heads.key_dim)}

    def forward(self, gate: Tensor) -> Tensor:
        return diagonal_log_decay(gate, self.A_log, self.dt_bias, self.lower_bound)


def diagonal_log_decay(gate: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float | None) -> Tensor:
    """Return the log decay [B, T, H, K] of Kimi Delta Attention, as `DiagonalGateBias` does, in at least float32.

    A_log has H elements and dt_bias H K, in any shape.
    """
    heads, keys = gate.shape[-2:]
    rate = at_least_float32(A_log).view(heads, 1).exp()
    biased = at_least_float32(gate) + dt_bias.view(heads, keys)
    return -rate * F.softplus(biased) if lower_bound is None else lower_bound * torch.sigmoid(rate * biased)


def log_rates(num_heads: int) -> Tensor:
    """Return first values of A_log [H]: the rates exp(A_log) are uniform in [1, 16]."""
    return torch.empty(num_heads).uniform_(1.0, 16.0).log_()


def time_step_bias(*shape: int) -> Tensor:
    """Return first values of dt_bias: the time steps softplus(dt_bias) are log-uniform in [1e-3, 1e-1]."""
    time_step = torch.empty(*shape).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
    return time_step + torch.log(-torch.expm1(-time_step))  # the inverse of softplus


def low_rank(inputs: int, rank: int, outputs: int, *, bias: bool) -> nn.Sequential:
    """Return the projection from `inputs` to `outputs` features through `rank` of them; the bias is at its end."""
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))


class SkipBias(HeadBias):
    """The skip connection y + D v of the operator's output y and its values v, both [B, T, H, V].

    D [H] starts at ones.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.D = nn.Parameter(torch.ones(num_heads))

    def initial_values(self) -> dict[str, Tensor]:
        return {"D": torch.ones(self.num_heads)}

    def forward(self, y: Tensor, v: Tensor) -> Tensor:
        return y + (self.D.unsqueeze(-1) * v).to(y.dtype)


class Variant(nn.Module):
    """The base of all variants.

    A subclass states its equation, sets the class attributes and defines `forward`. Parameters of the heads belong to a
    `HeadBias`.
    """

    transition: ClassVar[Literal["scalar_gate", "delta_rule"]] = "scalar_gate"
    """The transition of the state, which chooses the operator."""
    diagonal_gate: ClassVar[bool] = False
    """True for a decay of each key channel, False for one of each head."""
    safe_gate: ClassVar[bool] = False
    """True if the constructor takes `gate_lower_bound`, the least log decay of a token."""
    l2_normalize: ClassVar[bool] = False
    """True if the operator scales q and k to length 1 (delta rule only)."""
    gates_per_head: ClassVar[int] = 0
    """The number of gate logits per head that come from the hidden states."""
    conv_kernel: ClassVar[int] = 4
    """W, the tokens that the short convolution reads by default; 0 for no convolution and no SiLU."""
    conv_bias: ClassVar[bool] = False
    """True if the short convolution has a bias."""
    gate_before_norm: ClassVar[bool] = False
    """Output norm: True `norm(y * silu(z))` over each group's heads together, False `norm(y) * silu(z)` per head."""
    sigmoid_gate: ClassVar[bool] = False
    """True if the output norm's gate is sigmoid(z) in the place of silu(z)."""
    low_rank_output_gate: ClassVar[bool] = False
    """True if the projection to z has rank V."""
    paper_heads: ClassVar[HeadSizes]
    """The heads at the paper's hidden size of 1536."""

    def __init__(self, hidden_size: int, heads: HeadSizes) -> None:
        super().__init__()
        heads.check()
        self.heads = heads
        if self.gates_per_head:
            self.gates = nn.Linear(hidden_size, self.gates_per_head * heads.num_heads, bias=False)
        self.skip_bias: SkipBias | None = None  # the values bypass the operator through it

    @property
    def scale(self) -> float:
        """The operator's factor of q."""
        return self.heads.key_dim**-0.5

    def gate_logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return `gates_per_head` tensors [B, T, H] of gate logits in at least float32."""
        return at_least_float32(self.gates(x)).chunk(self.gates_per_head, dim=-1)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        """Return the operands of the operator of `transition`.

        Args:
            x: [B, T, D], the mixer's input before projection and convolution.
            q: [B, T, G, K], after the convolution.
            k: [B, T, G, K], after the convolution.
            v: [B, T, H, V], after the convolution.
        """
        return Operands(q, k, v, None)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it already is."""
    return x if x.dtype in WIDE else x.float()  # torch.promote_types takes as long as an operation
