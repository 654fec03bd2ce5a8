"""The Fenwick-array algorithm for GPUs. Importing this needs triton; TRITON_INTERPRET=1 runs it without a GPU."""

from loglinear.kernels.triton.scalar_gate.operator import scalar_gate

__all__ = ["scalar_gate"]
