"""The parts of a call on slices that both operators and scores share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loglinear.ops.state import unchanging
from loglinear.parallel.pieces import Piece, Tree, pieces

if TYPE_CHECKING:
    from loglinear.parallel.slices import Slices


def check_batch(slices: Slices, q: Tensor, chunk_size: int) -> None:
    """Raise ValueError unless q [B, n, ...] holds this rank's tokens and documents are cut at multiples of a chunk."""
    slices.check_time("q", q)
    if slices.documents is not None and len(q) != 1:
        raise ValueError(f"slices of packed documents need a batch of 1, got a batch of {len(q)}")
    if slices.chunk_size % chunk_size:
        raise ValueError(
            f"slices must be made with a multiple of the operator's chunk of {chunk_size} tokens, "
            f"got chunk_size={slices.chunk_size}"
        )


def most_pieces(slices: Slices, tree: Tree) -> int:
    """Return the largest number of pieces that a slice sends, so that all messages have one size."""
    return _most_pieces(slices.spans, tree)


@lru_cache(maxsize=64)
def _most_pieces(spans: tuple[tuple[int, int] | None, ...], tree: Tree) -> int:
    return max((len(pieces(*span, tree)) for span in spans if span is not None), default=0)


def older_pieces(slices: Slices, tree: Tree) -> Iterator[tuple[int, list[tuple[int, Piece]]]]:
    """Yield each older rank, oldest first, with its pieces and the columns that read them at this slice's beginning."""
    for rank in slices.older:
        span = slices.spans[rank]
        assert span is not None
        yield rank, [(tree.column(slices.position, piece.token), piece) for piece in pieces(*span, tree)]


@lru_cache(maxsize=64)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return these integers on a device, unchanging, so that all layers share the layouts that follow from them."""
    with torch.inference_mode(False):
        return unchanging(torch.tensor(numbers, device=device))
