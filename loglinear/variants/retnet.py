"""The variant RetNet."""

import torch
from torch import Tensor

from loglinear.variants.base import HeadSizes, Operands, Variant


class RetNet(Variant):
    """RetNet: retention with a fixed decay for each head h = 0 .. H-1.

        S_t = (1 - 2^(-5 - h)) S_{t-1} + k_t v_t^T

    This is the simple form without the rotation (xPos) of q and k. The short convolution encodes positions, as in the
    other variants.

    Source: Sun et al., "Retentive Network", arXiv 2307.08621, equations 6 and 8.
    """

    paper_heads = HeadSizes(num_heads=6, num_groups=6, key_dim=256, head_dim=512)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        head = torch.arange(self.heads.num_heads, dtype=torch.promote_types(v.dtype, torch.float32), device=v.device)
        log_decay_H = torch.log1p(-torch.exp2(-5 - head))
        return Operands(q, k, v, log_decay_H.expand(*v.shape[:3]))
