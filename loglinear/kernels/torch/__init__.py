"""The Fenwick-array algorithm in batched PyTorch: loops over levels and over slabs of heads, never over time."""

from __future__ import annotations

from loglinear.kernels.torch.bucket_energies import add_keys, bucket_energies, energies
from loglinear.kernels.torch.delta_rule import append_inverse_row, chunk_inverse, delta_rule_step
from loglinear.kernels.torch.operator import fenwick_array, stages
from loglinear.kernels.torch.recording import is_traced
from loglinear.kernels.torch.routed_weights import routed_weights
from loglinear.kernels.torch.scalar_gate import scalar_gate_step
from loglinear.kernels.torch.schedule import Schedule, schedule
from loglinear.kernels.torch.step import block_tokens, has_blocks, tokens_from

__all__ = [
    "Schedule",
    "add_keys",
    "append_inverse_row",
    "block_tokens",
    "bucket_energies",
    "chunk_inverse",
    "delta_rule_step",
    "energies",
    "fenwick_array",
    "has_blocks",
    "is_traced",
    "routed_weights",
    "scalar_gate_step",
    "schedule",
    "stages",
    "tokens_from",
]
