"""The share of one program: pairs of a token and a group, the heads of a group in turns, and all columns."""

# G groups, R heads of a group, L columns
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.launches import Launch, ceil_div

NUMBERS = 1024  # of one turn
LAUNCH = Launch(num_warps=4)


class Shares(NamedTuple):
    """The sizes of a call, and the tiles of its programs."""

    pairs: int
    groups: int
    heads: int  # of a group, R
    columns: int

    @classmethod
    def of(cls, weights: Tensor, scores: Tensor) -> Shares:
        """weights [B,T,H,L] or logits, scores [B,T,G,L]."""
        B, T, G, L = scores.shape
        return cls(B * T * G, G, weights.shape[2] // G, L)

    @property
    def tile(self) -> dict[str, int]:
        return tile_of(self.heads, self.columns)

    @property
    def grid(self) -> tuple[int]:
        return (ceil_div(self.pairs, self.tile["BP"]),)

    @property
    def constants(self) -> dict[str, int | None]:
        return self.tile | LAUNCH.options


@lru_cache
def tile_of(heads: int, columns: int) -> dict[str, int]:
    """Return the pairs, heads and columns of a turn. At most an eighth of the heads is padding."""
    BL, BR = next_power(columns), next_power(heads)
    while BR > 1 and (BR * BL > NUMBERS or 8 * ceil_div(heads, BR) * BR > 9 * heads):
        BR //= 2
    return dict(BP=max(1, NUMBERS // (BR * BL)), BR=BR, BL=BL)


def next_power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@triton.jit
def pairs_of_program(P, BP: tl.constexpr):
    """The program's first pair, the others' distances from it, and which of them there are. Those that are not there
    read the first pair again, so that nothing that they read is outside of a tensor."""
    first, i = tl.program_id(0) * BP, tl.arange(0, BP)
    is_pair = i < P - first
    return first, tl.where(is_pair, i, 0), is_pair


@triton.jit
def places(i, r, l, R, L):
    """The places of pairs i, heads r and columns l in [pairs, R, L], and which heads and columns there are."""
    place = (i * R * L)[:, None, None] + (r * L)[None, :, None] + l[None, None, :]
    return place, (r < R)[None, :, None] & (l < L)[None, None, :]


@triton.jit
def load_factors(tau, group, r, R, sharpness):
    """sharpness tau of the heads r of each pair's group, [BP, BR]; 0 beyond the group's heads."""
    return sharpness * tl.load(tau + (group * R)[:, None] + r[None, :], mask=(r < R)[None, :], other=0.0)
