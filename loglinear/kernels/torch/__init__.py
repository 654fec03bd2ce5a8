"""The Fenwick-array algorithm in batched PyTorch: loops over levels and over slabs of heads, never over time."""

from loglinear.kernels.torch.delta_rule import decode_step as delta_rule_step
from loglinear.kernels.torch.delta_rule import delta_rule
from loglinear.kernels.torch.scalar_gate import decode_step as scalar_gate_step
from loglinear.kernels.torch.scalar_gate import scalar_gate
from loglinear.kernels.torch.schedule import Schedule, schedule

__all__ = ["Schedule", "delta_rule", "delta_rule_step", "scalar_gate", "scalar_gate_step", "schedule"]
