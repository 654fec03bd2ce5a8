"""The reads of a chunk's queries inside their own chunk.

O_in = ((Q K^T * dec) * LAM) V
"""

# H heads of a slab, n chunks, C chunk, K key, V value
from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from loglinear.kernels.torch.chunks import decay_matrix
from loglinear.kernels.torch.workspace import matmul, product


def in_chunk(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, mask_CC: Tensor) -> Tensor:
    """O_in [H, n, C, V] from LAM, the mask of lambdas."""
    scores_CC = matmul(q, k.mT).mul_(decay_matrix(log_decay)).mul_(mask_CC)
    return matmul(scores_CC, v)


def in_chunk_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    mask_CC: Tensor,
    do: Tensor,
    pull_mask: Callable[[Tensor], None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the gradient of G; `pull_mask` takes that of LAM."""
    decay_CC = decay_matrix(log_decay)
    scores_CC = matmul(q, k.mT).mul_(decay_CC)
    dweights_CC = matmul(do, v.mT)
    pull_mask(product(dweights_CC, scores_CC))
    dscores_CC = dweights_CC.mul_(mask_CC)
    dv = matmul(product(scores_CC, mask_CC).mT, do)
    dlog_CC = scores_CC.mul_(dscores_CC)
    dcumulative = dlog_CC.sum(-1) - dlog_CC.sum(-2)
    dproducts_CC = dscores_CC.mul_(decay_CC)
    return matmul(dproducts_CC, k), matmul(dproducts_CC.mT, q), dv, dcumulative
