"""The candidates of `experiments.reads` as T x T matrices, token by token: the definition that the chunks must give.

A scalar decay commutes with all else, so no coefficient here has it: v_s counts exp(G_t - G_s) times as much, with G
the cumulative log decay.
"""

# B batch, H heads, T time, C chunks, f tokens of a chunk, K key, V value, N buckets
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.reads import Read, RoutedMixer
from experiments.reads.partition import CHUNK
from loglinear.layers.routing import SHARPNESS
from loglinear.ops.problem import unit_length


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
    """Return E' [B, H, T, T], the coefficient of v_s in q_t^T S, where S is the state of the chunk of s alone.

    S is written by that chunk's tokens up to t, without decay and from an empty state. Shapes as above.
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


def columns(length: int, read: Read) -> Tensor:
    """Return the bucket [T, T] of s for the query t, -1 for a later s."""
    index = read.partition.index
    return torch.tensor([[index(t, s) if s <= t else -1 for s in range(length)] for t in range(length)])


class DenseMixer(RoutedMixer):
    """A `RoutedMixer` with the same parameters that computes the definition."""

    def read(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None = None
    ) -> Tensor:
        routed, spec, T = self.routed, self.routed.read, x.shape[1]
        a = routed.bias_proj(x).unflatten(-1, (self.heads.num_heads, -1)).transpose(1, 2)  # [B, H, T, N]
        column = columns(T, spec)
        member = (column[..., None] == torch.arange(a.shape[-1])).to(x.dtype)  # [T, T, N]
        count = member.sum(1)
        if self.variant.l2_normalize:
            q, k = unit_length(q), unit_length(k)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        beta = None if beta is None else beta.transpose(1, 2)
        qk, kk = q @ k.mT, k @ k.mT
        decay = x.new_zeros(1, 1, T) if log_decay is None else log_decay.transpose(1, 2).cumsum(-1)
        own = column == 0
        end = torch.stack([(member.argmax(2) == c).long().mul(torch.arange(T)).amax(1) for c in range(a.shape[-1])], 1)
        end = torch.where(own, torch.arange(T)[:, None], end.gather(1, column.clamp(min=0)))
        ends = decay[..., end]  # [B, H, T, T] G at the end of the bucket of s
        after, inside = decay[..., None] - ends, ends - decay[..., None, :]
        if spec.eta:
            after = after * routed.eta()[:, None, None]
        causal = column >= 0
        fade = (after + inside).masked_fill(~causal, float("-inf")).exp()
        plain = block_coefficients(qk, kk, beta, CHUNK)
        linear = (plain if spec.unerased else linear_coefficients(qk, kk, beta)) * fade
        if spec.score != "none":
            a = a + SHARPNESS * routed.temperature()[:, None, None] * self.score(x, q, k, v, beta, member, linear)
        a = a.masked_fill(count == 0, float("-inf"))
        if spec.residual:
            null, gate = (layer(x).transpose(1, 2)[..., None] for layer in (routed.null, routed.gate))
            pi = torch.cat([null, a[..., 1:]], -1).softmax(-1) * (gate + routed.rho()[:, None, None])
            pi = torch.cat([torch.zeros_like(null), pi[..., 1:]], -1)
            far = torch.einsum("bhtn,tsn->bhts", pi, member)
            total = linear + far * plain * inside.masked_fill(~causal, float("-inf")).exp()
        else:
            w = a.softmax(-1) * (count > 0).sum(-1, keepdim=True)
            total = linear * torch.einsum("bhtn,tsn->bhts", w, member)
        return (self.variant.scale * total @ v).transpose(1, 2)

    def score(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, member: Tensor, linear: Tensor
    ) -> Tensor:
        spec, count = self.routed.read, member.sum(1)
        if spec.score == "energy":
            return (torch.einsum("bhts,tsn,bhsv->bhtnv", linear, member, v).square().sum(-1) + 1e-4).log() / 8
        if spec.score == "absorbed":
            taken = absorbed(q @ k.mT, k @ k.mT, beta, CHUNK)
            share = torch.einsum("bhtc,tcn->bhtn", taken, member[:, ::CHUNK])
        elif spec.score == "gram":
            hits = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).square()
            share = torch.einsum("bhts,tsn->bhtn", hits, member) - count / q.shape[-1]
        else:
            chunked = [tensor.unflatten(2, (-1, CHUNK)) for tensor in (q, k)]
            own_q, own_k = (tensor.flatten(2, 3) for tensor in self.routed.features(x, *chunked))
            hits = own_q @ own_k.mT
            share = torch.einsum("bhts,tsn->bhtn", hits, member) * count.clamp(min=1).rsqrt()
        return torch.cat([torch.zeros_like(share[..., :1]), share[..., 1:]], -1)
