"""One validated call of an operator: what every implementation receives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loglinear.ops.state import FenwickState

MIN_LOG_DECAY = -80.0  # exp(-80) = 2e-35: nothing is left; and -inf, which has no sums to take part in, is allowed


@dataclass(frozen=True)
class Problem:
    """All tensors in the working dtype (float32 or float64); shapes as in `loglinear.ops.api`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None
    level_scales: Tensor
    initial_state: FenwickState | None
    output_final_state: bool
    lengths: tuple[int, ...]  # tokens per sequence: one per batch row, or one per packed document
    chunk_size: int
