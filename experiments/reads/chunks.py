"""A linear model in chunks: the read of a token in its own chunk, and its read of the state of each older chunk.

A scalar decay commutes with everything else. So states and reads fade here only inside a chunk. The caller applies the
decay between chunks.
"""

# B batch, H heads, Z chunks, C tokens of a chunk, K key, V value, D distance in chunks
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Chunks(NamedTuple):
    """Chunks of a sequence, read by scalar gates (beta None) or by the delta rule."""

    own: Tensor  # [B, H, Z, C, C] coefficients of the values of a token's own chunk
    state: Tensor  # [B, H, Z, K, V] the writes of one chunk alone, faded to its end
    query: Tensor  # [B, H, Z, C, K] q after the token's own chunk, as it reads older chunks
    transition: Tensor | None  # [B, H, Z, K, K] P without decay: S <- P S; None for the identity

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None) -> Chunks:
        """Return the chunks of q, k [B, G, Z, C, K], v [B, H, Z, C, V] and the cumulative log decay [B, H, Z, C].

        With A = tril(diag(b) K K^T, -1), U = (I + A)^-1 diag(b) and E = tril(Q K^T) U:

            own = E * fade,    query = Q - E K,    P = I - K^T U K
        """
        qk = (q @ k.mT).tril()
        causal = torch.ones_like(qk[0, 0, 0]).tril().bool()
        fade = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, float("-inf")).exp()
        faded = v * (decay[..., -1:] - decay).exp()[..., None]
        if beta is None:
            return cls(qk * fade, k.mT @ faded, q, None)
        erase = (beta[..., None] * (k @ k.mT)).tril(-1)
        identity = torch.eye(len(causal), dtype=q.dtype, device=q.device)
        inverse = torch.linalg.solve_triangular(erase, identity.expand_as(erase), upper=False, unitriangular=True)
        solved = inverse * beta[..., None, :]
        one = torch.eye(k.shape[-1], dtype=q.dtype, device=q.device)
        return cls(qk @ solved * fade, k.mT @ (solved @ faded), q - qk @ solved @ k, one - k.mT @ solved @ k)

    def reads(self, q: Tensor | None = None) -> Tensor:
        """Return the reads [B, H, Z, C, D, V]: entry D reads the state D + 1 chunks back, and is 0 before the sequence.

        A query q [B, H, Z, C, K] reads all states as it is. None: the model's own query, which nearer chunks change.
        """
        Z, parts, now = self.state.shape[2], [], self.query if q is None else q
        for distance in range(1, Z):
            now = now[:, :, 1:]
            if q is None and self.transition is not None and distance > 1:
                now = now @ self.transition[:, :, 1 : Z - distance + 1]
            parts.append(F.pad(now @ self.state[:, :, : Z - distance], (0, 0, 0, 0, distance, 0)))
        if not parts:
            return self.state.new_zeros(*self.state.shape[:3], now.shape[3], 0, self.state.shape[4])
        return torch.stack(parts, 4)


def by_distance(x: Tensor) -> Tensor:
    """Return x [..., Z, C, Z], indexed by older chunk, as [..., Z, C, D], indexed by distance.

    Entry D is the chunk D + 1 chunks back. Entries before the sequence repeat chunk 0; the reads there are 0.
    """
    Z = x.shape[-1]
    steps = torch.arange(Z, device=x.device)
    index = (steps[:, None] - 1 - steps[None, : Z - 1]).clamp(min=0)
    return x.gather(-1, index[:, None].expand(*x.shape[:-1], Z - 1))
