"""The Fenwick-array algorithm in batched PyTorch: loops over levels and over slabs of heads, never over time."""

from __future__ import annotations

from torch import Tensor

from loglinear.kernels.torch.decode import has_blocks
from loglinear.kernels.torch.delta_rule import DeltaRuleSlab, append_inverse_row, chunk_inverse
from loglinear.kernels.torch.delta_rule import decode_step as delta_rule_step
from loglinear.kernels.torch.scalar_gate import ScalarGateSlab
from loglinear.kernels.torch.scalar_gate import decode_step as scalar_gate_step
from loglinear.kernels.torch.schedule import Schedule, schedule
from loglinear.kernels.torch.slab import OverSlabs

__all__ = [
    "Schedule", "append_inverse_row", "chunk_inverse", "delta_rule_step", "has_blocks", "run_delta_rule",
    "run_scalar_gate", "scalar_gate_step", "schedule",
]  # fmt: skip


def run_scalar_gate(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_scales: Tensor, nodes: Tensor | None, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """q, k [tokens,G,K]; v [tokens,H,V]; log_decay [tokens,H]; level_scales [tokens,H,L]; nodes [N,M,H,K,V] or None.

    Returns the outputs [tokens,H,V] and each sequence's block states at the start of its last chunk [N,M,H,K,V]
    (zeros unless the schedule was made with `final`).
    """
    return OverSlabs.apply(ScalarGateSlab, schedule, q, k, v, log_decay, level_scales, nodes)


def run_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    level_scales: Tensor,
    nodes: Tensor | None,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """As `run_scalar_gate`, with beta [tokens,H]."""
    return OverSlabs.apply(DeltaRuleSlab, schedule, q, k, v, log_decay, beta, level_scales, nodes)
