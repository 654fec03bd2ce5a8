"""The short convolution of a slice: its first tokens also read the last tokens of the slices before."""

# B batch, C channels, W kernel, R ranks, N sequences
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from loglinear.parallel.collectives import all_gather, joined

if TYPE_CHECKING:
    from loglinear.parallel.slices import Slices


def inputs_before(slices: Slices, x: Tensor, kernel: int) -> Tensor | None:
    """Return the state [N, W - 1, C] of a convolution over this rank's inputs x [B, n, C]; None for one tap.

    One all-gather has the last W - 1 inputs of each slice. A slice may hold fewer tokens, so the inputs may come from
    several slices. The state of the first document, or of every row, has the inputs that come before it in its own
    document. All other places are zero.
    """
    gap = kernel - 1
    if gap == 0:
        return None
    last = F.pad(x[:, : slices.length], (0, 0, gap, 0))[:, -gap:]
    gathered = all_gather(last, slices.processes)
    found: list[Tensor] = []
    missing = min(gap, slices.position)
    for rank in reversed(slices.older):
        count = min(missing, slices.lengths[rank])
        found.insert(0, gathered[rank][:, gap - count :])
        missing -= count
    state = F.pad(torch.cat([x[:, :0], *found], 1), (0, 0, gap - min(gap, slices.position), 0))
    boundaries = slices.cu_seqlens
    if boundaries is not None:
        state = F.pad(state, (0, 0, 0, 0, 0, len(boundaries) - 2))
    return joined(state, gathered)
