"""The variant Mamba-2."""

from torch import Tensor

from loglinear.variants.base import GateBias, HeadSizes, Operands, SkipBias, Variant


class Mamba2(Variant):
    """Mamba-2 (state space duality), with q = C, k = B, v = x dt.

        dt_t = softplus(W x_t + dt_bias)
        S_t  = exp(-exp(A_log) dt_t) S_{t-1} + k_t (dt_t v_t)^T
        y_t  = q_t^T S_t + D v_t

    The output norm is `norm(y * silu(z))`.

    Source: Dao, Gu, "Transformers are SSMs", arXiv 2405.21060, sections 6 and 7.
    """

    gates_per_head = 1
    conv_bias = True
    gate_before_norm = True
    paper_heads = HeadSizes(num_heads=48, num_groups=1, key_dim=128, head_dim=64)

    def __init__(self, hidden_size: int, heads: HeadSizes) -> None:
        super().__init__(hidden_size, heads)
        self.gate_bias, self.skip_bias = GateBias(heads.num_heads), SkipBias(heads.num_heads)

    @property
    def scale(self) -> float:
        return 1.0

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        (gate,) = self.gate_logits(x)
        time_step, log_decay = self.gate_bias(gate)
        return Operands(q, k, (v * time_step.unsqueeze(-1)).to(v.dtype), log_decay)
