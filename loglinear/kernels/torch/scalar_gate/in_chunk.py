"""The reads of a chunk's queries inside their own chunk.

O_in = ((Q K^T * dec) * LAM) V          Q K^T * dec are the gate's products: a diagonal gate decays every channel apart
"""

# H heads of a slab, n chunks, C chunk, K key, V value, D decays of a token
from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from loglinear.kernels.torch.gate import Gate
from loglinear.kernels.torch.workspace import matmul, product


def in_chunk(gate: Gate, q: Tensor, k: Tensor, v: Tensor, mask_CC: Tensor) -> Tensor:
    """O_in [H, n, C, V] from LAM, the mask of lambdas."""
    return matmul(gate.products(q, k).mul_(mask_CC), v)


def in_chunk_backward(
    gate: Gate,
    operands: tuple[Tensor, Tensor, Tensor],
    mask_CC: Tensor,
    do: Tensor,
    pull_mask: Callable[[Tensor], None],
    gradients: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """dlog_decay [H, n, C, D]; adds into the gradients of the operands q, k and v. `pull_mask` takes that of LAM."""
    (q, k, v), (dq, dk, dv) = operands, gradients
    scores_CC = gate.products(q, k)
    dweights_CC = matmul(do, v.mT)
    pull_mask(product(dweights_CC, scores_CC))
    dv.add_(matmul(product(scores_CC, mask_CC).mT, do))
    return gate.products_backward(dweights_CC.mul_(mask_CC), scores_CC, q, k, dq, dk)
