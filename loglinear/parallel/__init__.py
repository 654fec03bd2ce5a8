"""Sequences that lie on several devices (context parallelism), exactly, on torch.distributed."""

from loglinear.parallel.batch import shard
from loglinear.parallel.operators import log_linear_attention, log_linear_delta_rule
from loglinear.parallel.scores import bucket_scores
from loglinear.parallel.slices import Slices

__all__ = ["Slices", "bucket_scores", "log_linear_attention", "log_linear_delta_rule", "shard"]
