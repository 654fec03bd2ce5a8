"""Evaluation: bits per byte with their error and by position, needles in haystacks, membership, samples."""

from loglinear.evaluation.membership import Membership, evaluate_membership
from loglinear.evaluation.needle import NeedleScores, evaluate_needle, needle_examples
from loglinear.evaluation.perplexity import Perplexity, evaluate_perplexity
from loglinear.evaluation.sampling import Sample, sample

__all__ = [
    "Membership",
    "NeedleScores",
    "Perplexity",
    "Sample",
    "evaluate_membership",
    "evaluate_needle",
    "evaluate_perplexity",
    "needle_examples",
    "sample",
]
