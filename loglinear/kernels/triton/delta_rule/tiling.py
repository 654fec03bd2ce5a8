"""The tiles of each stage's arrays, one for a program, and the compiler's options for its kernel."""

# C chunk, K key, V value
from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from loglinear.kernels.triton.args import Math
from loglinear.kernels.triton.delta_rule.products import math_of
from loglinear.kernels.triton.launches import Plan, ceil_div, parts_of, tile_width

kept = cache  # of a method: tilings live as long as the process


@dataclass(frozen=True, eq=False)
class Tiling:
    """The tiles of all stages for one size of heads. One serves all calls that are alike (`tiling_of`) and keeps its
    answers; nobody changes them."""

    K: int
    V: int
    plan: Plan
    math: Math

    @kept
    def key_tile(self, stage: str) -> int:
        """Columns of a tile of an array that is K wide."""
        return min(self.plan[stage].key_tile, tile_width(self.K))

    def parts(self, stage: str) -> int:
        return parts_of(stage, self.plan.chunk_size)

    @kept
    def options(self, stage: str) -> dict[str, int | None]:
        """The tile of the keys' columns, and the compiler's options."""
        return dict(TK=self.key_tile(stage), **self.plan[stage].options)

    @kept
    def columns(self, stage: str, transition: bool = False) -> dict[str, int]:
        """The columns of a state, or of a transition, and of its tile."""
        width = self.K if transition else self.V
        return dict(V=width, BV=min(self.plan[stage].value_tile, tile_width(width)))

    @kept
    def key_constants(self, stage: str) -> dict[str, Any]:
        """The compile-time constants of a stage on arrays that are K wide, and the compiler's options."""
        return dict(K=self.K, MATH=math_of(stage, self.math), **self.options(stage))

    @kept
    def constants(self, stage: str, transition: bool = False) -> dict[str, Any]:
        """The constants of a stage on states, or on transitions."""
        return self.key_constants(stage) | self.columns(stage, transition)

    @kept
    def tiles(self, stage: str, transition: bool = False) -> int:
        """The tiles that a state, or a transition, has across."""
        columns = self.columns(stage, transition)
        return ceil_div(columns["V"], columns["BV"])

    @kept
    def column_tiles(self, stage: str) -> int:
        """The tiles that [states | transitions] have across."""
        BV = self.columns(stage)["BV"]
        return ceil_div(self.V, BV) + ceil_div(self.K, BV)

    @kept
    def key_tiles(self, stage: str) -> int:
        """The tiles of an array that is K wide."""
        return ceil_div(self.K, self.key_tile(stage))

    def all_tiles(self, stage: str) -> int:
        """The tiles of a state."""
        return self.key_tiles(stage) * self.tiles(stage)

    def square_tiles(self, stage: str) -> int:
        """The square tiles of a transition."""
        return self.key_tiles(stage) ** 2


@lru_cache
def tiling_of(K: int, V: int, plan: Plan, math: Math) -> Tiling:
    return Tiling(K, V, plan, math)
