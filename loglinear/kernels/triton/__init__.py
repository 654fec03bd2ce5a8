"""The Fenwick-array algorithm for GPUs. Importing this needs triton; TRITON_INTERPRET=1 runs it without a GPU."""

from loglinear.kernels.triton.bucket_scores import bucket_scores
from loglinear.kernels.triton.operator import chunkwise
from loglinear.kernels.triton.routed_weights import routed_weights
from loglinear.kernels.triton.step import step

__all__ = ["bucket_scores", "chunkwise", "routed_weights", "step"]
