"""Curves of a score that separates members from others, and the numbers that summarise them.

A threshold c calls every document with a score of at most c a member: low scores speak for membership. The true
positive rate is the share of members that are called members. The false positive rate is the share of others that are.
Documents of one score are called members together, so a curve has one point for each distinct score.

# M members, N others, D documents of either, S distinct scores
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

SAMPLES = 1000  # of a bootstrap
LEVEL = 0.95  # of its interval


@dataclass(frozen=True)
class RocCurve:
    """The receiver operating characteristic of one score."""

    thresholds_S: np.ndarray  # the distinct scores, rising
    members_S: np.ndarray  # members with each score
    others_S: np.ndarray  # others with each score

    @cached_property
    def true_positive_rate_S(self) -> np.ndarray:
        """The share of members with a score of at most each threshold."""
        return np.cumsum(self.members_S) / self.members_S.sum()

    @cached_property
    def false_positive_rate_S(self) -> np.ndarray:
        """The share of others with a score of at most each threshold."""
        return np.cumsum(self.others_S) / self.others_S.sum()

    @property
    def auc(self) -> float:
        """The area under the curve: P(member < other) + P(member = other) / 2 for a random pair of documents."""
        return _auc(self.members_S, self.others_S)

    def auc_interval(self, seed: int = 0) -> tuple[float, float]:
        """Return the 95 % percentile interval of the area over 1,000 bootstrap samples of members and of others.

        Source: Efron, Bootstrap methods: another look at the jackknife, 1979.
        """
        rng = np.random.default_rng(seed)
        scores = len(self.thresholds_S)
        places = [np.repeat(np.arange(scores), counts_S) for counts_S in (self.members_S, self.others_S)]
        areas = [_auc(*(_resampled(places_D, rng, scores) for places_D in places)) for _ in range(SAMPLES)]
        low, high = np.quantile(areas, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def best_f1(self) -> tuple[float, float]:
        """Return the largest F1 = 2 TP / (2 TP + FP + FN) over all thresholds, and the lowest threshold with it.

        The threshold is chosen on the documents that it is scored on. A threshold that calls all documents members
        has an F1 of 2 M / (2 M + N), which is 2/3 for equally many members and others.
        """
        found_S = np.cumsum(self.members_S)
        f1_S = 2 * found_S / (found_S + np.cumsum(self.others_S) + self.members_S.sum())
        best = int(np.argmax(f1_S))
        return float(f1_S[best]), float(self.thresholds_S[best])

    def true_positive_rate_at(self, false_positive_rate: float) -> float:
        """Return the largest true positive rate of a threshold with at most this false positive rate.

        There is no interpolation: with fewer than 1 / rate others, no other may be called a member.
        """
        allowed_S = self.false_positive_rate_S <= false_positive_rate
        return float(self.true_positive_rate_S[allowed_S].max(initial=0.0))


def roc_curve(members_M: np.ndarray, others_N: np.ndarray) -> RocCurve:
    """Return the curve of the scores of members and of others.

    Raises ValueError if there are no members or no others, or if a score is not finite.
    """
    for name, scores in (("members", members_M), ("others", others_N)):
        if len(scores) == 0:
            raise ValueError(f"there are no {name}, expected at least one document")
        if not np.isfinite(scores).all():
            raise ValueError(f"scores of {name} must be finite, got {scores[~np.isfinite(scores)][0]}")
    thresholds_S, places = np.unique(np.concatenate([members_M, others_N]), return_inverse=True)
    counts = (np.bincount(part, minlength=len(thresholds_S)) for part in np.split(places, [len(members_M)]))
    return RocCurve(thresholds_S, *counts)


def _auc(members_S: np.ndarray, others_S: np.ndarray) -> float:
    total = others_S.sum()
    above_S = total - np.cumsum(others_S) + others_S / 2  # others with a higher score; an equal one counts half
    return float(members_S @ above_S / (members_S.sum() * total))


def _resampled(places_D: np.ndarray, rng: np.random.Generator, scores: int) -> np.ndarray:
    """Return how many documents have each score in a sample of equal size, drawn with replacement."""
    return np.bincount(places_D[rng.integers(len(places_D), size=len(places_D))], minlength=scores)
