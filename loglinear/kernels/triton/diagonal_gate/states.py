"""The arrays between the stages, and a call as these stages take it."""

# B batch, T time, H heads, K key, V value, C chunk
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from loglinear.fenwick import log2
from loglinear.kernels.triton.args import Rows
from loglinear.kernels.triton.launches import Launch, tile_width
from loglinear.kernels.triton.scalar_gate import states
from loglinear.kernels.triton.scalar_gate.states import Parts


class Decayed(NamedTuple):
    """Queries, keys and scores of every head with the decays inside its chunks in them."""

    q: Rows  # [B,T,H,K], from the chunk's start to each token
    k: Rows  # [B,T,H,K], from each token to the chunk's end
    scores: Tensor  # [chunk, H, C, C] float32, without lambda, 0 above the diagonal
    totals: Tensor  # [tier, chunk, H, K], of which this stage writes the first tier


class DecayedGradients(NamedTuple):
    """The gradients of `Decayed`."""

    q: Rows  # [B,T,H,K] float32
    k: Rows  # [B,T,H,K] float32
    scores: Tensor  # [chunk, H, C, C], a factor of products; anything above the diagonal


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

    def channel_tile(self, launch: Launch) -> int:
        """Channels of the keys that a program of a stage with the decays inside chunks takes at a time."""
        return min(launch.key_tile, tile_width(self.key_dim))

    def channel_constants(self, launch: Launch) -> dict[str, Any]:
        """The compile-time constants of these stages, and the compiler's options."""
        C = self.chunk_size
        sizes = dict(K=self.key_dim, C=C, LEVELS=log2(C), BK=self.channel_tile(launch))
        return dict(**sizes, MATH=self.math, **launch.options)
