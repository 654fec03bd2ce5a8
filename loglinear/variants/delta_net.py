"""The variant DeltaNet."""

from torch import Tensor

from loglinear.variants.base import HeadSizes, Operands, Variant


class DeltaNet(Variant):
    """DeltaNet: the delta rule without decay, with q and k of length 1.

        S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,    b_t = sigmoid(W x_t)

    Source: Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule", arXiv 2406.06484,
    equation 4.
    """

    transition = "delta_rule"
    l2_normalize = True
    gates_per_head = 1
    paper_heads = HeadSizes(num_heads=12, num_groups=12, key_dim=128, head_dim=128)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        (beta,) = self.gate_logits(x)
        return Operands(q, k, v, None, beta.sigmoid())
