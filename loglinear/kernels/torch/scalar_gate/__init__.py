"""S_t = Diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, in chunks. The transition of a block is one number per head (a
scalar gate) or one per head and channel of the keys (a diagonal gate)."""

from loglinear.kernels.torch.scalar_gate.slab import ScalarGateSlab
from loglinear.kernels.torch.scalar_gate.step import scalar_gate_step

__all__ = ["ScalarGateSlab", "scalar_gate_step"]
