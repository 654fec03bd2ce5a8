"""The variant GLA."""

from torch import Tensor
from torch.nn import functional as F

from loglinear.variants.base import HeadSizes, Operands, Variant, at_least_float32, low_rank

RANK = 16
TEMPERATURE = 16


class GLA(Variant):
    """Gated linear attention: a decay of its own for each channel of the keys.

        S_t = Diag(a_t) S_{t-1} + k_t v_t^T,    log a_t = logsigmoid(W_2 W_1 x_t + b) / 16

    W_1 has 16 rows. As published there is no short convolution and no SiLU on q, k and v. `conv_kernel` adds both.

    Source: Yang, Wang, Shen, Panda, Kim, "Gated Linear Attention Transformers with Hardware-Efficient Training",
    arXiv 2312.06635, section 4.4.
    """

    diagonal_gate = True
    conv_kernel = 0
    paper_heads = HeadSizes(num_heads=4, num_groups=4, key_dim=192, head_dim=384)

    def __init__(self, hidden_size: int, heads: HeadSizes) -> None:
        super().__init__(hidden_size, heads)
        self.decay_proj = low_rank(hidden_size, RANK, heads.num_heads * heads.key_dim, bias=True)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        gate = at_least_float32(self.decay_proj(x)).unflatten(-1, (self.heads.num_heads, self.heads.key_dim))
        return Operands(q, k, v, F.logsigmoid(gate) / TEMPERATURE)
