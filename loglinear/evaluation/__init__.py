"""Evaluation: perplexity as bits per byte, its error over documents and its course over positions; samples of text."""

from loglinear.evaluation.perplexity import Perplexity, evaluate_perplexity
from loglinear.evaluation.sampling import Sample, sample

__all__ = ["Perplexity", "Sample", "evaluate_perplexity", "sample"]
