"""The arrays between the stages, and a call as these stages take it."""

# B batch, T time, H heads, G groups, K key, V value, L levels, C chunk, N sequences, M blocks
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.kernels.triton import args, inputs
from loglinear.kernels.triton.args import Rows
from loglinear.kernels.triton.delta_rule.layout import Layout, Tier
from loglinear.kernels.triton.delta_rule.tiling import Tiling, tiling_of
from loglinear.kernels.triton.diagonal_gate.states import Decayed


class TierSizes(NamedTuple):
    """The sizes of a tier. A kernel takes them one by one, as it does `args.Sizes`."""

    H: int
    per_row: int  # entries of one sequence of a dense batch
    cap: int
    num_slots: int
    columns: int
    collapsed: int  # is the older past in one block with the last slot?
    first_block: int  # the number of the block in the first slot
    places: int  # columns of the tier below, or blocks of a final state: the entries' slots, then older columns


# Arguments of kernels that are never specialised.
SIZES = [*args.SIZES, *TierSizes._fields]


class Saved(NamedTuple):
    """The arrays that the forward saves for the backward, or some heads of them; and with a diagonal gate the products
    that no stage but the first can make."""

    inverse: Tensor  # [chunk, H, C, C], A
    stride: int  # of its chunks
    cumulative: Tensor  # [chunk, H, C], G in base 2
    scores: Tensor | None = None  # [chunk, H, C, C], Q K^T * dec
    products: Tensor | None = None  # [chunk, H, C, C], K K^T * dec below the diagonal

    @classmethod
    def of(cls, inverse: Tensor, cumulative: Tensor, decayed: Decayed | None = None) -> Saved:
        products = (None, None) if decayed is None else (decayed.scores, decayed.products)
        return cls(inverse, inverse.stride(0), cumulative, *products)


class Totals(NamedTuple):
    """log2 of the decays of entries: of a scalar gate or of a diagonal one."""

    heads: Tensor | None  # [entry, H]
    channels: Tensor | None = None  # [entry, H, K]

    def empty_like(self, entries: int) -> Totals:
        """Room for those of so many entries."""
        arrays = (x if x is None else torch.empty(entries, *x.shape[1:], device=x.device) for x in self)
        return Totals(*arrays)


class Entries(NamedTuple):
    """The entries of a tier: entry i turns a state into P_i S + S_i, with P_i = Diag(2**total) + D."""

    transitions: Tensor  # [entry, H, K, K], D
    totals: Totals
    states: Tensor | None  # [entry, H, K, V]; None once the tier is scanned


class EntryGradients(NamedTuple):
    """The gradients of a tier's entries: of their own states, and of D."""

    states: Tensor
    transitions: Tensor


class Past(NamedTuple):
    """The past that the entries of a tier read: that of their run, and through a transition F that before the run."""

    kept: Tensor  # [entry, slot, H, K, V], Y
    prefixes: Tensor  # [entry, H, K, K], D of F from the start of the run, from each run's second entry on
    prefix_totals: Totals  # of its decay
    carried: Tensor  # [run, column, H, K, V], R
    initial: Tensor | None  # [N, M, H, K, V], the blocks of the initial state


class PastGradients(NamedTuple):
    """The gradients of `Past`."""

    kept: Tensor
    prefixes: Tensor
    carried: Tensor


class TierStates(NamedTuple):
    """A tier with its entries and their past."""

    tier: Tier
    entries: Entries
    past: Past


class Inside(NamedTuple):
    """The part of the forward inside a chunk that its adjoint needs again."""

    effective: Tensor  # [chunk, H, C, C], T
    weights: Tensor  # [chunk, H, C, C], T * LAM


class Queries(NamedTuple):
    """The queries of the reads between chunks, and their gradients, [chunk, H, C, K] each."""

    dq_in: Tensor  # dX, at the start of the chunk
    q_run: Tensor  # X' = X F, at the start of the run; only where something is carried to it
    dq_run: Tensor  # dX'


class InsideGradients(NamedTuple):
    """The part of the adjoint inside a chunk on the side of the queries."""

    dq_in: Tensor  # [chunk, H, C, K], dX
    dscores: Tensor  # [chunk, H, C, C], dS
    dlog_row: Tensor  # [chunk, H, C], of the decays: the rows' share
    dlog_column: Tensor  # [chunk, H, 2, part, C], and the columns': of S, and of N, by the part of the rows


class Writes(NamedTuple):
    """The gradients of the writes of a chunk that the keys and beta still have to gather."""

    dkeys: Tensor  # [chunk, H, C, K] float32, dKd
    sums: Tensor  # [chunk, H, tile, C], shares of dbeta: of the tiles of [R_K | R_V]


class Lower(NamedTuple):
    """The gradients of the lower triangular N."""

    dlower: Tensor  # [chunk, H, C, C], dN'
    dlog_state: Tensor  # [chunk, H, C], of the decays: each token's gift to the state


@dataclass(frozen=True)
class Inputs(inputs.Inputs):
    """A call of the delta rule. Of a diagonal gate the first stage makes a call of all others: it is `decayed`."""

    layout: Layout
    decayed: Decayed | None = None

    @property
    def is_diagonal(self) -> bool:
        return self.log_decay.data.dim() == 4

    @property
    def gifts(self) -> Rows:
        """The keys that a chunk gives its values to. With a diagonal gate they have decayed to the chunk's end."""
        return self.k if self.decayed is None else self.decayed.k

    @cached_property
    def tiling(self) -> Tiling:
        return tiling_of(self.key_dim, self.value_dim, self.plan, self.math)

    def tier_sizes(self, tier: Tier, places: int = 0) -> TierSizes:
        numbers = tier.slots, tier.columns, int(tier.collapsed), tier.first_block
        return TierSizes(self.heads, tier.per_row, self.sizes.cap, *numbers, places)

    def key_constants(self, stage: str) -> dict[str, Any]:
        return self.tiling.key_constants(stage)

    def constants(self, stage: str, transition: bool = False) -> dict[str, Any]:
        return self.tiling.constants(stage, transition)
