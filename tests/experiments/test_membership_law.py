"""The law of membership: recovered from its own points, wrong as printed, and of a score from 1/2 to 1."""

import numpy as np
import pytest

from experiments.membership_law import PUBLISHED, Law, fit_law, matched_f1
from loglinear.evaluation.roc import roc_curve

RATIO = np.geomspace(4, 400, 9)


@pytest.mark.parametrize(
    "true", [Law(0.98, 0.05, -60.0), Law(0.9, 0.4, -12.0), Law(0.95, 0.06, -40.0), Law(1.34, -0.034, -33.14)]
)
def test_the_constants_of_points_on_a_law_are_recovered(true):
    fitted = fit_law(RATIO, true(RATIO))
    assert fitted[:3] == pytest.approx(true[:3], rel=1e-4) and fitted.error < 1e-7


def test_noise_moves_the_curve_by_no_more_than_the_noise():
    true, rng = Law(0.97, 0.05, -60.0), np.random.default_rng(0)
    noise = 0.01 * rng.standard_normal(len(RATIO))
    fitted = fit_law(RATIO, true(RATIO) + noise)
    assert np.abs(fitted(RATIO) - true(RATIO)).max() < 0.02
    assert fitted.error <= np.sqrt(np.mean(noise**2))  # the true law is one of those that were compared
    assert fitted.error == pytest.approx(np.sqrt(np.mean((fitted(RATIO) - true(RATIO) - noise) ** 2)), rel=1e-9)


def test_the_best_point_of_the_grid_is_not_the_only_start():
    """From it alone the descent ends in a minimum that is worse than the true law."""
    true, ratio = Law(1.055, 0.8474, -13.584), 640 / 2.0 ** np.arange(7)
    noise = np.array([-0.007, -0.001, -0.0261, -0.0178, 0.0088, 0.0034, 0.001])
    assert fit_law(ratio, true(ratio) + noise).error <= np.sqrt(np.mean(noise**2))


def test_the_printed_constants_contradict_themselves():
    """F1 of a large dataset, whose members nobody can tell, is above 1, and that of a small one is 1/2."""
    assert PUBLISHED(0) == pytest.approx(1.006, abs=5e-4) and PUBLISHED(1e6) == pytest.approx(0.5)
    other_sign = PUBLISHED._replace(c2=-PUBLISHED.c2)
    assert other_sign(0) == pytest.approx(0.664, abs=5e-4) and other_sign(1e6) == pytest.approx(1.17)


def test_fewer_points_than_a_law_needs_are_refused():
    with pytest.raises(ValueError, match="needs four different ratios or more, got 3"):
        fit_law(np.array([1.0, 2.0, 3.0, 3.0]), np.full(4, 0.7))


def test_matched_f1_is_a_half_by_chance_and_one_at_best():
    assert matched_f1(roc_curve(np.arange(5.0), np.arange(5.0) + 9)) == 1
    assert matched_f1(roc_curve(np.arange(5.0) + 9, np.arange(5.0))) == 0
    assert matched_f1(roc_curve(np.zeros(5), np.zeros(5))) == 2 / 3  # all are called members
    rng = np.random.default_rng(0)
    assert matched_f1(roc_curve(rng.random(4000), rng.random(4000))) == pytest.approx(0.5, abs=0.03)
    curve = roc_curve(np.array([1.0, 2.0, 6.0]), np.array([3.0, 4.0, 5.0]))  # 1, 2 and 3 are called members
    assert matched_f1(curve) == pytest.approx(2 / 3)
