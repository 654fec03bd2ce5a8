"""The public operators. This package needs torch alone: no GPU, no triton, no transformers."""

from loglinear.ops.api import IMPLEMENTATIONS, LogLinearOutput, log_linear_attention, log_linear_delta_rule
from loglinear.ops.state import FenwickState

__all__ = ["IMPLEMENTATIONS", "FenwickState", "LogLinearOutput", "log_linear_attention", "log_linear_delta_rule"]
