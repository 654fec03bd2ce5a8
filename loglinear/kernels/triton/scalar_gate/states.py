"""The arrays between the stages, and a call as these stages take it."""

# B batch, T time, H heads, G groups, K key, V value, C chunk, N sequences, M blocks
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from loglinear.kernels.triton import inputs
from loglinear.kernels.triton.args import Math, Planes, Sizes
from loglinear.kernels.triton.launches import Launch, ceil_div, tile_width
from loglinear.kernels.triton.layout import Layout

ROWS = 64  # tokens of a chunk that one program takes at most, where it holds all pairs of them
ELEMENTS = 1024  # numbers of a state that one program of the elementwise stages takes
SWEEP_STEPS = 8  # tiles of the states that one program of a sweep takes
PROGRAMS = 528  # four for each of the 132 multiprocessors of an H100: heads are split until a launch has as many


class States(NamedTuple):
    """The Fenwick array of one slab of heads. Decays are base-2 logarithms; a diagonal gate has K for each head."""

    slots: Tensor  # [chunk, H, K, V]: a chunk's own state, and after the sweeps the block that ends with it
    initial: Tensor | None  # [N, M, H, K, V], the blocks of the initial state
    log_decay: Tensor  # [chunk, H], over each block
    totals: Tensor  # [tier, chunk, H], over each entry of a tier
    cumulative: Tensor | None  # [chunk, H, C], G; a diagonal gate's decays are in its queries and keys already


class Parts(NamedTuple):
    """The parts of all states that have one decay each: H of `sizes` counts them in place of heads. Numbers of each."""

    sizes: Sizes
    size: int


class StateGradients(NamedTuple):
    """The gradients of `States`: of slots and initial blocks, and of the log decays of blocks."""

    slots: Tensor
    initial: Tensor | None
    log_decay: Tensor


class Totals(NamedTuple):
    """The gradients of the entries' totals [tier, part, chunk, H], and the strides of their first two axes."""

    data: Tensor
    tier: int
    part: int


class Inside(NamedTuple):
    """The part of the adjoint inside a chunk."""

    dscores: Planes  # [plane, chunk, G, pair, rows, rows], dA: pairs of halves 00, 10, 11
    dlog_row: Tensor  # [chunk, H, C], of the decays: the reads of each token
    dlog_column: Tensor  # [chunk, H, C], and the gifts
    dcross_scales: Tensor  # [chunk, H, rows], dlambda of the second half's reads of the first


class Reads(NamedTuple):
    """The part of the adjoint between chunks that the query's side leaves to the states' side and to the decays."""

    dlog_walk: Tensor  # [chunk, H, C], of the decays: the reads of each token outside its half
    paths: Tensor  # [chunk, H, READS], log2 of the decay from each block's end to the chunk
    beyond: Tensor  # [chunk, half, H, READS], of the decays: the reads of farther blocks than each


class Flows(NamedTuple):
    """The same of a diagonal gate: the flow [K] of a read is the sum over its tokens of query x dquery. And the log
    decays of chunks and of runs, from which the readers' side computes paths."""

    until: Planes  # [READS, chunk, H, K], of a read and all nearer ones
    whole: Tensor  # [chunk, H, K], of all reads
    totals: Tensor  # [chunk, H, K]
    run_totals: Tensor  # [chunk, H, K], at the last chunk of each run


def value_tile(V: int, launch: Launch) -> int:
    """Columns of V of one program."""
    return min(launch.value_tile, tile_width(V))


@lru_cache
def constants(K: int, V: int, C: int, math: Math, launch: Launch) -> dict[str, Any]:
    """The compile-time constants of every stage on tokens, and the compiler's options. Do not change it."""
    return dict(K=K, V=V, C=C, BK=tile_width(K), BV=value_tile(V, launch), MATH=math, **launch.options)


@dataclass(frozen=True)
class Inputs(inputs.Inputs):
    """A call of the scalar gate. Stages on tokens take a long chunk in halves: two tiles on the diagonal, one below."""

    layout: Layout

    @property
    def halves(self) -> int:
        return 2 if self.chunk_size > ROWS else 1

    @property
    def rows(self) -> int:
        return self.chunk_size // self.halves

    @property
    def state_size(self) -> int:
        return self.key_dim * self.value_dim

    @cached_property
    def parts(self) -> Parts:
        """The stages on states alone take these: whole states, or rows of them under a diagonal gate."""
        return Parts(self.sizes, self.state_size)

    @cached_property
    def splits(self) -> int:
        """Into how many programs a group's heads go, so that short sequences fill the device."""
        programs, R = self.layout.chunks * self.halves * self.groups, self.sizes.R
        return next((s for s in range(1, R) if R % s == 0 and programs * s >= PROGRAMS), R)

    def constants(self, launch: Launch) -> dict[str, Any]:
        """The compile-time constants of every stage on tokens, and the compiler's options."""
        return constants(self.key_dim, self.value_dim, self.chunk_size, self.math, launch)

    def value_tiles(self, launch: Launch) -> int:
        return ceil_div(self.value_dim, value_tile(self.value_dim, launch))

    def sweep_tiles(self, launch: Launch) -> tuple[int, int, int]:
        """The numbers of a tile of the sweeps, the tiles of one program, and the programs of one part."""
        size = self.parts.size
        tile = min(launch.value_tile, tile_width(size))
        steps = min(SWEEP_STEPS, ceil_div(size, tile))
        return tile, steps, ceil_div(size, tile * steps)

    @cached_property
    def elements(self) -> int:
        """The numbers of a part that one program of the elementwise stages takes."""
        return min(ELEMENTS, tile_width(self.parts.size))

    @property
    def columns(self) -> int:
        """The columns of a half; the second half reads all of the first in the next one, or in the only one."""
        return max(1, self.tree.column - self.halves + 1)

    @property
    def is_one_level(self) -> bool:
        """Do all reads inside a half have one column?"""
        return self.columns == 1 or self.sizes.L == 1
