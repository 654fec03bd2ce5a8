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


class GatedDeltaNet(Variant):
    """The gated delta rule, q and k of length 1:

        S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T
        log a_t = -exp(A_log) softplus(W_a x_t + dt_bias),    b_t = sigmoid(W_b x_t)

    Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464, equation 10.
    """

    transition = "delta_rule"
    l2_normalize = True
    gates_per_head = 2
    paper_heads = HeadSizes(num_heads=6, num_groups=6, key_dim=192, head_dim=384)
    no_weight_decay = ("A_log", "dt_bias")
    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def initial_values(self) -> dict[str, Tensor]:
        H = self.heads.num_heads
        return {"A_log": exponential_decay_rates(H), "dt_bias": inverse_softplus_time_steps(H)}

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        gate, beta = self.gate_logits(x)
        log_decay = -at_least_float32(self.A_log).exp() * F.softplus(gate + self.dt_bias)
        return Operands(q, k, v, log_decay, beta.sigmoid())
