"""Coefficients of values as T x T matrices, in blocks: what a linear model reads, and what each block alone gives.

A scalar decay commutes with all else, so no coefficient here has it: v_s counts exp(G_t - G_s) times as much, with G
the cumulative log decay.
"""

# B batch, H heads, T time, Z query blocks, C key blocks, f tokens of a block, K key, V value
from __future__ import annotations

import torch
from torch import Tensor


def linear_coefficients(qk: Tensor, kk: Tensor, beta: Tensor | None) -> Tensor:
    """Return E [B, H, T, T], the coefficient of v_s in the linear model's output at t without decay.

    Scalar gate: q_t . k_s. Delta rule: tril(Q K^T) (I + tril(diag(b) K K^T, -1))^-1 diag(b).

    The shapes are qk, kk [B, H, T, T] and beta [B, H, T].
    """
    qk = qk.tril()
    if beta is None:
        return qk
    erase = (beta[..., :, None] * kk).tril(-1)
    solved = torch.linalg.solve_triangular(erase.mT, qk.mT, upper=True, unitriangular=True).mT
    return solved * beta[..., None, :]


def block_coefficients(qk: Tensor, kk: Tensor, beta: Tensor | None, finest: int) -> Tensor:
    """Return E' [B, H, T, T], the coefficient of v_s in q_t^T S, where S is the state of the block of s alone.

    S is written by that block's tokens up to t, without decay and from an empty state. Shapes as above.
    """
    qk = qk.tril()
    if beta is None:
        return qk
    B, H, T, _ = qk.shape
    C, f = T // finest, finest
    inside = kk.unflatten(2, (C, f)).unflatten(4, (C, f)).diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)
    strength = beta.unflatten(2, (C, f))
    erase = (strength[..., :, None] * inside).tril(-1)
    columns = qk.unflatten(3, (C, f)).transpose(2, 3)  # [B, H, C, T, f]
    solved = torch.linalg.solve_triangular(erase.mT, columns.mT, upper=True, unitriangular=True).mT
    return (solved * strength[..., None, :]).transpose(2, 3).flatten(3)


def absorbed(qk: Tensor, kk: Tensor, beta: Tensor, finest: int) -> Tensor:
    """Return 1 - |P_c^T q_t|^2 [B, H, T, C] for unit queries, P_c the product of the block's I - b k k^T."""
    T = qk.shape[2]
    C, f = T // finest, finest
    inside = kk.unflatten(2, (C, f)).unflatten(4, (C, f)).diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)
    taken = block_coefficients(qk, kk, beta, finest).unflatten(3, (C, f))  # P^T q = q - sum_j taken_j k_j
    hit = qk.tril().unflatten(3, (C, f))
    square = torch.einsum("bhtci,bhcij,bhtcj->bhtc", taken, inside, taken)
    return 2 * (taken * hit).sum(-1) - square
