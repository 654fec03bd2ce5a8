"""S_t = (I - beta_t k_t k_t^T) Diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T, in chunks.

The gate is scalar or diagonal, and the transition of a block is a K x K matrix. Write Z = [P | S] for a block's
transition and state: both obey Z <- P_right Z_left + [0 | S_right].
"""

from loglinear.kernels.torch.delta_rule.slab import DeltaRuleSlab
from loglinear.kernels.torch.delta_rule.step import append_inverse_row, chunk_inverse, delta_rule_step

__all__ = ["DeltaRuleSlab", "append_inverse_row", "chunk_inverse", "delta_rule_step"]
