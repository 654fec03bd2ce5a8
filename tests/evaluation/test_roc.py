import numpy as np
import pytest

from loglinear.evaluation.roc import roc_curve


def points(members, others):
    """Every threshold with the counts of members and others that it calls members, one document after another."""
    for threshold in sorted({*members, *others}):
        yield threshold, sum(m <= threshold for m in members), sum(o <= threshold for o in others)


SETS = {
    "distinct": (np.random.default_rng(0).normal(-0.5, 1, 23), np.random.default_rng(1).normal(0, 1, 31)),
    "ties": (np.array([1.0, 1, 2, 2, 3, 5]), np.array([1.0, 2, 2, 4, 4, 5, 6])),
    "one of each": (np.array([3.0]), np.array([2.0])),
    "one score": (np.full(3, 7.0), np.full(5, 7.0)),
    "hundreds": (
        np.random.default_rng(2).integers(0, 60, 300) / 7.0,
        np.random.default_rng(3).integers(5, 90, 250) / 7.0,
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_every_number_is_that_of_counting(name):
    members, others = SETS[name]
    curve, counted = roc_curve(members, others), list(points(members, others))
    assert curve.thresholds_S.tolist() == [threshold for threshold, _, _ in counted]
    assert curve.true_positive_rate_S == pytest.approx([true / len(members) for _, true, _ in counted], abs=1e-12)
    assert curve.false_positive_rate_S == pytest.approx([false / len(others) for _, _, false in counted], abs=1e-12)
    wins = sum((m < o) + (m == o) / 2 for m in members for o in others)
    assert curve.auc == pytest.approx(wins / len(members) / len(others), abs=1e-12)
    f1 = {threshold: 2 * true / (true + false + len(members)) for threshold, true, false in counted}
    best, threshold = curve.best_f1()
    assert best == pytest.approx(max(f1.values()), abs=1e-12) and f1[threshold] == pytest.approx(best, abs=1e-12)
    for rate in (0, 0.01, 0.1, 0.5, 1):
        allowed = [true / len(members) for _, true, false in counted if false / len(others) <= rate]
        assert curve.true_positive_rate_at(rate) == pytest.approx(max(allowed, default=0), abs=1e-12)


def test_area_is_that_under_the_curve_with_straight_lines():
    for members, others in SETS.values():
        curve = roc_curve(members, others)
        heights, widths = np.array([0, *curve.true_positive_rate_S]), np.diff([0, *curve.false_positive_rate_S])
        area = widths @ (heights[1:] + heights[:-1]) / 2
        assert curve.auc == pytest.approx(area, abs=1e-12)


def test_separable_sets_have_an_area_of_1_and_equal_ones_of_one_half():
    low, high = np.arange(5.0), np.arange(5.0, 12)
    assert roc_curve(low, high).auc == 1 and roc_curve(low, high).auc_interval() == (1, 1)
    assert roc_curve(low, high).best_f1() == (1, 4) and roc_curve(low, high).true_positive_rate_at(0.01) == 1
    assert roc_curve(high, low).auc == 0 and roc_curve(high, low).true_positive_rate_at(0.01) == 0
    same = roc_curve(low, low)
    assert same.auc == 0.5 and same.best_f1()[0] == pytest.approx(2 / 3)


def test_ties_do_not_depend_on_the_order_of_documents():
    members, others = SETS["ties"]
    curve, turned = roc_curve(members, others), roc_curve(members[::-1], others[::-1])
    assert curve.auc == turned.auc and curve.auc_interval(3) == turned.auc_interval(3)


def test_interval_is_that_of_resampled_documents():
    members, others = SETS["hundreds"]
    curve = roc_curve(members, others)
    low, high = curve.auc_interval(seed=1)
    assert low < curve.auc < high
    assert curve.auc_interval(seed=1) == (low, high) != curve.auc_interval(seed=2)
    rng = np.random.default_rng(5)
    areas = [roc_curve(rng.choice(members, len(members)), rng.choice(others, len(others))).auc for _ in range(1000)]
    error = np.std(areas)
    assert [low, high] == pytest.approx(np.quantile(areas, [0.025, 0.975]), abs=error / 3)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)


def test_nothing_to_tell_apart_is_one_clear_line():
    some = np.ones(2)
    with pytest.raises(ValueError, match="there are no members, expected at least one document"):
        roc_curve(np.zeros(0), some)
    with pytest.raises(ValueError, match="there are no others"):
        roc_curve(some, np.zeros(0))
    with pytest.raises(ValueError, match="scores of others must be finite, got nan"):
        roc_curve(some, np.array([1, np.nan]))
