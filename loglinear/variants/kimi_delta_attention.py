"""The variant Kimi Delta Attention."""

from torch import Tensor

from loglinear.variants.base import DiagonalGateBias, HeadSizes, Operands, Variant, low_rank


class KimiDeltaAttention(Variant):
    """Kimi Delta Attention: the delta rule with a decay for each channel of the keys, and with q and k of length 1.

        S_t = (I - b_t k_t k_t^T) Diag(a_t) S_{t-1} + b_t k_t v_t^T
        log a_t = -exp(A_log) softplus(W_2 W_1 x_t + dt_bias),    b_t = sigmoid(W_b x_t)

    W_1 has V rows, and so has the first projection of the output gate sigmoid(z). The safe gate bounds the decays
    from below: log a_t = lower_bound sigmoid(exp(A_log) (W_2 W_1 x_t + dt_bias)).

    Args:
        hidden_size: D.
        heads: H, G, K and V.
        gate_lower_bound: The least log decay of a token, below 0. None: no bound, as published.

    Source: Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", arXiv 2510.26692, equations 1
    and 9; the safe gate is that of flash-linear-attention's `kda` and of transformers' GLM-5-next.
    """

    transition = "delta_rule"
    diagonal_gate = True
    safe_gate = True
    l2_normalize = True
    gates_per_head = 1
    sigmoid_gate = True
    low_rank_output_gate = True
    paper_heads = HeadSizes(num_heads=12, num_groups=12, key_dim=128, head_dim=128)

    def __init__(self, hidden_size: int, heads: HeadSizes, gate_lower_bound: float | None = None) -> None:
        super().__init__(hidden_size, heads)
        self.decay_proj = low_rank(hidden_size, heads.head_dim, heads.num_heads * heads.key_dim, bias=False)
        self.gate_bias = DiagonalGateBias(heads, gate_lower_bound)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        (beta,) = self.gate_logits(x)
        gate = self.decay_proj(x).unflatten(-1, (self.heads.num_heads, self.heads.key_dim))
        return Operands(q, k, v, self.gate_bias(gate), beta.sigmoid())
