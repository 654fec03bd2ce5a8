import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loglinear.variants.base import (
    HeadSizes,
    Operands,
    Variant,
    at_least_float32,
    exponential_decay_rates,
    inverse_softplus_time_steps,
)


class Mamba2(Variant):
    """Mamba-2 (state space duality): q = C, k = B, v = x dt,

        dt_t = softplus(W x_t + dt_bias)
        S_t  = exp(-exp(A_log) dt_t) S_{t-1} + k_t (dt_t v_t)^T
        y_t  = q_t^T S_t + D v_t

    Dao, Gu, "Transformers are SSMs", arXiv 2405.21060, sections 6 and 7; output norm `norm(y * silu(z))`.
    """

    gates_per_head = 1
    conv_bias = True
    gate_before_norm = True
    paper_heads = HeadSizes(num_heads=48, num_groups=1, key_dim=128, head_dim=64)
    no_weight_decay = ("A_log", "dt_bias", "D")
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    D: nn.Parameter

    @property
    def scale(self) -> float:
        return 1.0

    def initial_values(self) -> dict[str, Tensor]:
        H = self.heads.num_heads
        return {
            "A_log": exponential_decay_rates(H),
            "dt_bias": inverse_softplus_time_steps(H),
            "D": torch.ones(H),
        }

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        (gate,) = self.gate_logits(x)
        time_step = F.softplus(gate + self.dt_bias)
        log_decay = -at_least_float32(self.A_log).exp() * time_step
        return Operands(q, k, (v * time_step.unsqueeze(-1)).to(v.dtype), log_decay)

    def skip(self, output: Tensor, v: Tensor) -> Tensor:
        return output + (self.D.unsqueeze(-1) * v).to(output.dtype)
