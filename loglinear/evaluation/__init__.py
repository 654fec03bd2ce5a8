"""Evaluation: perplexity as bits per byte, its error over documents and its course over positions; needles in
haystacks; samples of text."""

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
