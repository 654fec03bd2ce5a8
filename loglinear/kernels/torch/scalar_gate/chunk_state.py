"""Each chunk's own state at its end, and what it does to a state that comes in.

    S_z = K^T diag(exp(Gam - G)) V          P_z = exp(Gam)

G the cumulative log decay inside the chunk, Gam its last value; of a diagonal gate for every channel of K.
"""

# H heads of a slab, n chunks, C chunk, K key, V value, D decays of a token
from __future__ import annotations

from torch import Tensor

from loglinear.kernels.torch.gate import Gate
from loglinear.kernels.torch.workspace import matmul, product


def chunk_state(gate: Gate, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """Writes S [H,n,K,V] to out; returns log P [H,n,D]."""
    matmul(product(k, gate.to_end).mT, v, out=out)
    return gate.log_decay.sum(-2)


def chunk_state_backward(gate: Gate, k: Tensor, v: Tensor, dstate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv and the flow [H,n,C,D] through exp(Gam - G) from dS."""
    dv = matmul(product(k, gate.to_end), dstate)
    dk = matmul(v, dstate.mT).mul_(gate.to_end)
    return dk, dv, gate.flow(k, dk)
