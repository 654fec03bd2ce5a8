"""The reads of a chunk's queries inside their own chunk.

O_in = ((Q K^T * dec) * LAM) V
"""

# H heads of a slab, n chunks, C chunk, K key, V value, L levels
from __future__ import annotations

from torch import Tensor

from loglinear.kernels.torch.tiles import decay_matrix, level_mask, level_mask_backward
from loglinear.kernels.torch.workspace import matmul, product


def in_chunk(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_scales: Tensor) -> Tensor:
    scores_CC = matmul(q, k.mT).mul_(decay_matrix(log_decay)).mul_(level_mask(level_scales))
    return matmul(scores_CC, v)


def in_chunk_backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_scales: Tensor, do: Tensor, dlevel_scales: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the gradient of G; adds lambda's gradient into dlevel_scales."""
    decay_CC, mask_CC = decay_matrix(log_decay), level_mask(level_scales)
    scores_CC = matmul(q, k.mT).mul_(decay_CC)
    dweights_CC = matmul(do, v.mT)
    level_mask_backward(product(dweights_CC, scores_CC), dlevel_scales)
    dscores_CC = dweights_CC.mul_(mask_CC)
    dv = matmul(product(scores_CC, mask_CC).mT, do)
    flow_CC = scores_CC.mul_(dscores_CC)
    dcumulative = flow_CC.sum(-1) - flow_CC.sum(-2)
    dproducts_CC = dscores_CC.mul_(decay_CC)
    return matmul(dproducts_CC, k), matmul(dproducts_CC.mT, q), dv, dcumulative
