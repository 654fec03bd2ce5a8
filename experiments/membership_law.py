"""The law of membership inference over the ratio of capacity to dataset size, fitted to points."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loglinear.evaluation.roc import RocCurve

COLUMNS = ("c1", "c2", "c3", "F1 of large datasets", "error")  # of `Law.cells`
STARTS = 3  # best points of the grid, because a single one can lead to another minimum
SLOPES = (-100.0, -30.0, -10.0, -3.0, 3.0, 10.0, 30.0, 100.0)  # of the grid, over the range of the ratios


class Law(NamedTuple):
    """F1 = (1 + c1 sigmoid(c2 (ratio + c3))) / 2, where the ratio is the capacity in bits over the pieces.

    Source: Morris et al., arXiv 2505.24832, whose printed constants PUBLISHED contradict the text around them. F1 falls
    from 1.006 for large datasets, where it should be 0.5, to 0.5 for small ones, where it should be 1. The other sign
    of c2 does not mend it: F1 would be 0.66 for large datasets and 1.17 for small ones.
    """

    c1: float
    c2: float
    c3: float
    error: float = 0.0
    """The root of the mean squared difference of the fitted points."""

    def __call__(self, ratio: float | np.ndarray) -> np.ndarray:
        """Return F1 for a ratio in bits a piece."""
        z = self.c2 * (np.asarray(ratio, dtype=float) + self.c3)
        return (1 + self.c1 * 0.5 * (1 + np.tanh(z / 2))) / 2

    def cells(self) -> list[str]:
        """Return the cells of COLUMNS."""
        return [f"{self.c1:.3f}", f"{self.c2:.3g}", f"{self.c3:.4g}", f"{float(self(0)):.3f}", f"{self.error:.3f}"]


PUBLISHED = Law(1.34, -0.034, -33.14)


def fit_law(ratio_P: np.ndarray, f1_P: np.ndarray) -> Law:
    """Return the law of least squares: min over c of the sum of (F1(ratio) - f1)^2.

    c1 is linear, so it is solved exactly for every c2 and c3. L-BFGS of PyTorch finds these two, from each of the
    STARTS best points of a grid.

    Raises ValueError for fewer than four different ratios, which three constants would nearly always fit.
    """
    if len(set(ratio_P.tolist())) < 4:
        raise ValueError(f"a law of three constants needs four different ratios or more, got {len(set(ratio_P))}")
    middle, width = float(ratio_P.mean()), float(np.ptp(ratio_P))
    x_P, y_P = torch.tensor((ratio_P - middle) / width), torch.tensor(2 * f1_P - 1)
    grid_G2 = torch.tensor([(slope, -slope * float(x)) for slope in SLOPES for x in x_P], dtype=torch.float64)
    losses_G = _solved(grid_G2, x_P, y_P)[1]
    starts_S = losses_G.argsort(stable=True)[:STARTS]
    line = min((_descended(grid_G2[start], x_P, y_P) for start in starts_S), key=lambda line: _loss(line, x_P, y_P))
    c1, loss = _solved(line, x_P, y_P)
    slope, offset = line.tolist()
    return Law(c1.item(), slope / width, offset * width / slope - middle, math.sqrt(loss.item()) / 2)


def _descended(start: Tensor, x_P: Tensor, y_P: Tensor) -> Tensor:
    """Return the line of a local minimum near a line."""
    line = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [line], max_iter=1000, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = _solved(line, x_P, y_P)[1]
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return line.detach()


def _loss(line: Tensor, x_P: Tensor, y_P: Tensor) -> float:
    return _solved(line, x_P, y_P)[1].item()


def _solved(line: Tensor, x_P: Tensor, y_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return c1 and the mean squared error of y = c1 sigmoid(slope x + offset) for lines (slope, offset) [..., 2]."""
    sigmoid_P = torch.sigmoid(line[..., :1] * x_P + line[..., 1:])
    smallest = torch.finfo(sigmoid_P.dtype).tiny  # a sigmoid that is 0 everywhere explains nothing
    c1 = (sigmoid_P * y_P).sum(-1) / sigmoid_P.square().sum(-1).clamp(min=smallest)
    return c1, (c1[..., None] * sigmoid_P - y_P).square().mean(-1)


def matched_f1(curve: RocCurve) -> float:
    """Return F1 at the lowest threshold that calls at least as many documents members as there are members.

    For equally many members and others it is 1/2 by chance and 1 at best, as in the law. `RocCurve.best_f1` is at least
    2/3 there.
    """
    found_S, called_S = np.cumsum(curve.members_S), np.cumsum(curve.members_S + curve.others_S)
    members = curve.members_S.sum()
    place = int(np.searchsorted(called_S, members))
    return float(2 * found_S[place] / (called_S[place] + members))
