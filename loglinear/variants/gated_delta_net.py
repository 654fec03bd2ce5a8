"""The variant Gated DeltaNet."""

from torch import Tensor

from loglinear.variants.base import GateBias, HeadSizes, Operands, Variant


class GatedDeltaNet(Variant):
    """Gated DeltaNet: the gated delta rule, with q and k of length 1.

        S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T
        log a_t = -exp(A_log) softplus(W_a x_t + dt_bias),    b_t = sigmoid(W_b x_t)

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464, equation 10.
    """

    transition = "delta_rule"
    l2_normalize = True
    gates_per_head = 2
    paper_heads = HeadSizes(num_heads=6, num_groups=6, key_dim=192, head_dim=384)

    def __init__(self, hidden_size: int, heads: HeadSizes) -> None:
        super().__init__(hidden_size, heads)
        self.gate_bias = GateBias(heads.num_heads)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        gate, beta = self.gate_logits(x)
        _, log_decay = self.gate_bias(gate)
        return Operands(q, k, v, log_decay, beta.sigmoid())
