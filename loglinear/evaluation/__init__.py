"""Evaluation: bits per byte with their error and by position, needles in haystacks, samples of text."""

from loglinear.evaluation.needle import NeedleScores, evaluate_needle, needle_examples
from loglinear.evaluation.perplexity import Perplexity, evaluate_perplexity
from loglinear.evaluation.sampling import Sample, sample

__all__ = [
    "NeedleScores",
    "Perplexity",
    "Sample",
    "evaluate_needle",
    "evaluate_perplexity",
    "needle_examples",
    "sample",
]
