"""Each chunk's own state at its end, and what it does to a state that comes in.

    S_z = K^T diag(exp(Gam - G)) V          P_z = exp(Gam)

G the cumulative log decay inside the chunk, Gam its last value.
"""

# H heads of a slab, n chunks, C chunk, K key, V value
from __future__ import annotations

from torch import Tensor

from loglinear.kernels.torch.chunks import suffix_sums
from loglinear.kernels.torch.workspace import matmul, product


def chunk_state(k: Tensor, v: Tensor, log_decay: Tensor, out: Tensor) -> Tensor:
    """Writes S [H,n,K,V] to out; returns log P [H,n]."""
    matmul(product(k, suffix_sums(log_decay).exp_()[..., None]).mT, v, out=out)
    return log_decay.sum(-1)


def chunk_state_backward(
    k: Tensor, v: Tensor, log_decay: Tensor, dstate: Tensor, dtotal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv and the gradient of G from dS and d log P."""
    to_end = suffix_sums(log_decay).exp_()[..., None]
    dv = matmul(product(k, to_end), dstate)
    dk = matmul(v, dstate.mT).mul_(to_end)
    dlog = product(dk, k).sum(-1)
    dcumulative = -dlog
    dcumulative[..., -1] += dlog.sum(-1) + dtotal
    return dk, dv, dcumulative
