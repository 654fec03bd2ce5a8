"""The arrays between the stages, and a call as these stages take it."""

# B batch, T time, H heads, K key, V value, C chunk
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from loglinear.fenwick import log2
from loglinear.kernels.triton import inputs
from loglinear.kernels.triton.args import Rows, Slab
from loglinear.kernels.triton.launches import Launch, tile_width
from loglinear.kernels.triton.scalar_gate import states
from loglinear.kernels.triton.scalar_gate.states import Parts, Totals


class Decayed(NamedTuple):
    """Queries, keys and scores of every head with the decays inside its chunks in them. The last two fields are the
    delta rule's."""

    q: Rows  # [B,T,H,K], from the chunk's start to each token
    k: Rows  # [B,T,H,K], from each token to the chunk's end
    scores: Tensor  # [chunk, H, C, C] float32, without lambda, 0 above the diagonal
    totals: Tensor  # [chunk, H, K], or [tier, chunk, H, K] of which this stage writes the first tier
    seen: Rows | None = None  # [B,T,H,K], keys as the past sees them: from the chunk's start to each token
    products: Tensor | None = None  # [chunk, H, C, C] float32, of keys with earlier keys, 0 elsewhere


class DecayedGradients(NamedTuple):
    """The gradients of `Decayed`. Of products the one is anything on and above the diagonal, the other above it."""

    q: Tensor  # [chunk, H, C, K]
    k: Tensor  # [chunk, H, C, K] float32
    scores: Tensor  # [chunk, H, C, C], a factor of products
    totals: Totals | None = None
    transitions: Tensor | None = None  # [chunk, H, K, K], in place of totals: they are the diagonals
    seen: Slab | None = None  # [B,T,H,K] float32
    products: Tensor | None = None  # [chunk, H, C, C], a factor of products


def channel_tile(K: int, launch: Launch) -> int:
    """Return how many channels of the keys a program of a stage with the decays inside chunks takes at a time."""
    return min(launch.key_tile, tile_width(K))


def channel_constants(x: inputs.Inputs, launch: Launch) -> dict[str, Any]:
    """Return the compile-time constants of these stages, and the compiler's options."""
    C, K = x.chunk_size, x.key_dim
    return dict(K=K, C=C, LEVELS=log2(C), BK=channel_tile(K, launch), **launch.options)


@dataclass(frozen=True)
class Inputs(states.Inputs):
    """A call of the diagonal gate. A chunk has at most 64 tokens, and a program takes all of them."""

    @cached_property
    def parts(self) -> Parts:
        """Each row of a state has a decay of its own."""
        return Parts(self.sizes._replace(H=self.heads * self.key_dim), self.value_dim)

    @cached_property
    def splits(self) -> int:
        """Every head decays the queries and keys of its group in its own way, in a program of its own."""
        return self.sizes.R

    def of_heads(self, decayed: Decayed) -> Inputs:
        """Return the call of the later stages: every head has its own queries and keys, which have decayed."""
        return replace(self, q=decayed.q, k=decayed.k, sizes=self.sizes._replace(R=1))
