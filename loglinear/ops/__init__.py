"""The public operators and their states; they need torch, but no GPU, triton or transformers."""

from loglinear.ops.api import IMPLEMENTATIONS, LogLinearOutput, log_linear_attention, log_linear_delta_rule
from loglinear.ops.scores import BucketScores, bucket_scores, bucket_tokens
from loglinear.ops.scores_step import bucket_scores_step
from loglinear.ops.state import DecodeState, FenwickState
from loglinear.ops.step import log_linear_attention_step, log_linear_delta_rule_step
from loglinear.ops.weights import routed_weights
from loglinear.partition import Partition

__all__ = [
    "IMPLEMENTATIONS",
    "BucketScores",
    "DecodeState",
    "FenwickState",
    "LogLinearOutput",
    "Partition",
    "bucket_scores",
    "bucket_scores_step",
    "bucket_tokens",
    "log_linear_attention",
    "log_linear_attention_step",
    "log_linear_delta_rule",
    "log_linear_delta_rule_step",
    "routed_weights",
]
