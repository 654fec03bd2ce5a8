"""The variant simple GLA."""

from torch import Tensor
from torch.nn import functional as F

from loglinear.variants.base import HeadSizes, Operands, Variant


class SimpleGLA(Variant):
    """Simple GLA: gated linear attention with one gate per head.

        S_t = a_t S_{t-1} + k_t v_t^T,    log a_t = logsigmoid(W x_t) / 16

    Source: Yang et al., "Gated Linear Attention Transformers", arXiv 2312.06635 (section 4.4 for the temperature of
    16), with the scalar gate of flash-linear-attention's `simple_gla`.
    """

    gates_per_head = 1
    paper_heads = HeadSizes(num_heads=4, num_groups=4, key_dim=384, head_dim=384)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        (gate,) = self.gate_logits(x)
        return Operands(q, k, v, F.logsigmoid(gate) / 16)
