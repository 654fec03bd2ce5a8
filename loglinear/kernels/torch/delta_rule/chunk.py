"""Everything of the delta rule that stays inside a chunk.

    A    = (I + tril(diag(b) K K^T * dec, -1))^-1         Ab = A diag(b)
    E    = (Q K^T * dec) Ab       the effective attention: the coefficient of v_j in o_i
    Ke   = diag(exp(G)) K         keys as an incoming state sees them
    Y    = K^T diag(exp(Gam - G)) Ab

    O_in = (E * LAM) V            Qh = diag(exp(G)) Q - E Ke     how queries see an incoming state
    S_z  = Y V                    P_z = exp(Gam) I - Y Ke

K K^T * dec and Q K^T * dec are the gate's products, and exp(G) and exp(Gam - G) its decays. A diagonal gate has them
for every channel: diag(exp(G)) K is then exp(G) * K, elementwise.

Source: Yang, Kautz, Hatamizadeh, arXiv 2412.06464 (the WY form), written with E and Y; Kimi Team, arXiv 2510.26692
(the diagonal gate).
"""

# H heads of a slab, n chunks, C chunk, K key, V value
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.kernels.torch.gate import Gate, of_gate
from loglinear.kernels.torch.workspace import matmul, product


class Chunk(NamedTuple):
    """The chunk quantities that several stages share."""

    gate: Gate
    keys_CC: Tensor  # K K^T * dec
    inverse_CC: Tensor  # A
    write_CC: Tensor  # Ab
    incoming_CK: Tensor  # Ke
    outgoing_KC: Tensor  # Y


def chunk_quantities(k: Tensor, beta: Tensor, gate: Gate) -> Chunk:
    keys_CC = gate.products(k, k)
    erase_CC = product(keys_CC, beta[..., None]).tril_(-1)
    identity = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    inverse_CC = torch.linalg.solve_triangular(
        erase_CC + identity, identity.expand_as(erase_CC), upper=False, unitriangular=True
    )
    write_CC = product(inverse_CC, beta[..., None, :])
    outgoing_KC = matmul(product(k, gate.to_end).mT, write_CC)
    return Chunk(gate, keys_CC, inverse_CC, write_CC, product(k, gate.from_start), outgoing_KC)


def chunk_state(chunk: Chunk, v: Tensor, out: Tensor) -> None:
    """Writes [P_z | S_z] to out [H, n, K, K + V]."""
    K = chunk.incoming_CK.shape[-1]
    out[..., :K] = matmul(chunk.outgoing_KC, chunk.incoming_CK).neg_()
    out[..., :K].diagonal(dim1=-2, dim2=-1).add_(chunk.gate.whole)
    out[..., K:] = matmul(chunk.outgoing_KC, v)


def queries(chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, mask_CC: Tensor) -> tuple[Tensor, Tensor]:
    """O_in [H, n, C, V] and Qh [H, n, C, K] from LAM, the mask of lambdas."""
    effective_CC = matmul(chunk.gate.products(q, k), chunk.write_CC)
    q_in = product(q, chunk.gate.from_start).sub_(matmul(effective_CC, chunk.incoming_CK))
    return matmul(product(effective_CC, mask_CC), v), q_in


def chunk_backward(
    chunk: Chunk,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    mask_CC: Tensor,
    do: Tensor,
    dq_in: Tensor,
    dslots: Tensor,
    pull_mask: Callable[[Tensor], None],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbeta and dlog_decay [H, n, C, D] from dO, dQh and [dP | dS]; `pull_mask` takes that of LAM."""
    K, gate = k.shape[-1], chunk.gate
    dtransition, dstate = dslots[..., :K], dslots[..., K:]
    products_CC = gate.products(q, k)
    effective_CC = matmul(products_CC, chunk.write_CC)

    # O_in = (E * LAM) V,  Qh = exp(G) Q - E Ke
    dweights_CC = matmul(do, v.mT)
    pull_mask(product(dweights_CC, effective_CC))
    deffective_CC = dweights_CC.mul_(mask_CC).sub_(matmul(dq_in, chunk.incoming_CK.mT))
    dv = matmul(product(effective_CC, mask_CC).mT, do)
    dincoming = matmul(effective_CC.mT, dq_in).neg_()
    dq = product(dq_in, gate.from_start)
    flow_in = gate.flow(q, dq)

    # S = Y V,  P = exp(Gam) I - Y Ke
    doutgoing_KC = matmul(dstate, v.mT).sub_(matmul(dtransition, chunk.incoming_CK.mT))
    dv += matmul(chunk.outgoing_KC.mT, dstate)
    dincoming -= matmul(chunk.outgoing_KC.mT, dtransition)
    dtotal = of_gate(dtransition.diagonal(dim1=-2, dim2=-1), gate.whole.shape[-1]) * gate.whole

    # E = (Q K^T * dec) Ab,  Y = Kd^T Ab,  Ke = exp(G) K,  Kd = exp(Gam - G) K
    dproducts_CC = matmul(deffective_CC, chunk.write_CC.mT)
    dwrite_CC = matmul(products_CC.mT, deffective_CC).add_(matmul(product(k, gate.to_end), doutgoing_KC))
    dk = matmul(chunk.write_CC, doutgoing_KC.mT).mul_(gate.to_end)
    flow_out = gate.flow(k, dk)
    flow_in += gate.flow(chunk.incoming_CK, dincoming)
    dk += product(dincoming, gate.from_start)
    dlog_decay = gate.gradient(flow_in, flow_out, dtotal)

    # Ab = A diag(b),  A = (I + tril(diag(b) keys, -1))^-1
    dbeta = product(dwrite_CC, chunk.inverse_CC).sum(-2)
    dinverse_CC = dwrite_CC.mul_(beta[..., None, :])
    derase_CC = matmul(matmul(chunk.inverse_CC.mT, dinverse_CC), chunk.inverse_CC.mT).neg_().tril_(-1)
    dbeta += product(derase_CC, chunk.keys_CC).sum(-1)
    dkeys_CC = derase_CC.mul_(beta[..., None])

    # Q K^T * dec and K K^T * dec
    dlog_decay += gate.products_backward(dproducts_CC, products_CC, q, k, dq, dk)
    dlog_decay += gate.products_backward(dkeys_CC, chunk.keys_CC, k, k, dk, dk)
    return dq, dk, dv, dbeta, dlog_decay
