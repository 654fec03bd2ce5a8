"""The fast paths. kernels.torch runs everywhere, kernels.triton on GPUs."""

MIN_LOG_DECAY = -80.0  # exp(-80) = 2e-35: nothing is left; and -inf, which has no sums to take part in, is allowed
