"""S_t = exp(log_decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, in chunks; the transition of a block is a
K x K matrix.

Forward:   chunk_inverse, up_sweep, carry, output.
"""
