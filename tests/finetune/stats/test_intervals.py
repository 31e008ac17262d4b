"""Intervals and verdicts against scipy, hand calculations and simulations."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from finetune.stats import intervals, paired, verdicts
from finetune.stats.intervals import Difference, Estimate


def test_mean_interval_is_students():
    values = [59.1, 60.2, 57.9, 61.0, 58.4]
    found, reference = intervals.mean_interval(values), scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((np.mean(values), *reference, 5), abs=1e-10)
    # Two runs by hand: t(1) at 97.5 % is 12.7062, the deviation √2, its error of the mean 1.
    assert intervals.mean_interval([80.0, 82.0]).high == pytest.approx(81 + 12.7062, abs=1e-4)
    assert intervals.mean_interval([80.5]) == Estimate(80.5, None, None, 1)


def test_mean_over_tasks_weighs_tasks_alike():
    # Two tasks of two values: variances 2 and 8, so parts of 2 / 2 / 4 and 8 / 2 / 4 with one degree of freedom each.
    found = intervals.mean_over_tasks([[79.0, 81.0], [58.0, 62.0]])
    df = (0.25 + 1) ** 2 / (0.25**2 + 1)
    half = scipy_stats.t.ppf(0.975, df) * math.sqrt(0.25 + 1)
    assert (found.value, found.low, found.high, found.df) == pytest.approx((70.0, 70 - half, 70 + half, df))
    assert intervals.mean_over_tasks([[1.0, 2.0], [3.0]]) == Difference(2.25)
    assert intervals.mean_over_tasks([[0.5, 0.5], [1.0, 1.0]]) == Difference(0.75, 0.75, 0.75, math.inf, 0.0)


@pytest.mark.parametrize("tasks", [[], [[]], [[1.0, math.nan]], [[math.inf, 1.0]], [[[1.0]]]])
def test_values_that_are_none(tasks):
    for call in (
        intervals.mean_over_tasks,
        lambda given: intervals.bootstrap(given, seed=0),
        lambda given: intervals.difference_from_paper(given, 1.0, [1.0] * len(given), 5),
        lambda given: paired.sign_flip_test(given, seed=0),
    ):
        with pytest.raises(ValueError, match="at least one finite value"):
            call(tasks)


@pytest.mark.parametrize(("iqm", "width"), [(False, 3), (True, 6)])
def test_bootstrap_draws_within_tasks(iqm, width):
    # Two tasks far apart: resampling across tasks would give an interval of some 20 points.
    tasks = [[10.0, 11.0, 12.0, 13.0], [80.0, 81.0, 82.0, 83.0]]
    found = intervals.bootstrap(tasks, seed=0, iqm=iqm)
    assert found.mean == pytest.approx(46.5) and found.n == 4
    assert found.low < found.mean < found.high < found.low + width
    assert intervals.bootstrap(tasks, seed=0, iqm=iqm) == found
    assert intervals.bootstrap([[1.0], [2.0, 3.0]], seed=0, iqm=iqm).low is None


def test_bootstrap_enumerated_by_hand():
    # Each task's resampled mean is low, middle, middle, high with probability 1/4 each: 2.5 % is the least sum.
    found = intervals.bootstrap([[0.0, 2.0], [10.0, 30.0]], seed=0)
    assert found == Estimate(10.5, (0 + 10) / 2, (2 + 30) / 2, 2)
    # Tasks differ by 50 points and runs not at all: no resample can move the average.
    assert intervals.bootstrap([[40.0, 40.0], [90.0, 90.0, 90.0]], seed=0) == Estimate(65.0, 65.0, 65.0, 2)


def test_interquartile_mean_is_of_all_values():
    values = [[1.0, 9.0, 4.0], [2.0, 100.0], [5.0, 6.0, -50.0]]
    assert intervals.bootstrap(values, seed=0, iqm=True).mean == pytest.approx(np.mean([2, 4, 5, 6]))


def test_welch_equals_scipys():
    ours, theirs = np.array([86.1, 87.4, 85.2, 88.0]), np.array([84.0, 84.5, 83.1])
    # numpy's deviation, as printed
    found = intervals.difference_from_paper([ours], theirs.mean(), [theirs.std()], paper_n=3)
    test = scipy_stats.ttest_ind(ours, theirs, equal_var=False)
    low, high = test.confidence_interval(0.95)
    expected = (ours.mean() - theirs.mean(), low, high, test.df, test.pvalue)
    assert (found.value, found.low, found.high, found.df, found.p) == pytest.approx(expected, abs=1e-10)


def test_average_difference_by_hand():
    # Two tasks, sample variances 2 and 8 (n = 2), paper's population deviation 1 twice with n = 5: variance 5/4.
    found = intervals.difference_from_paper([[79.0, 81.0], [58.0, 62.0]], 69.0, [1.0, 1.0], paper_n=5)
    parts = [(2 / 2 / 4, 1), (8 / 2 / 4, 1), (1.25 / 5 / 4, 4), (1.25 / 5 / 4, 4)]
    total = sum(part for part, _ in parts)
    df = total**2 / sum(part**2 / freedom for part, freedom in parts)
    half = scipy_stats.t.ppf(0.975, df) * math.sqrt(total)
    assert (found.value, found.low, found.high, found.df) == pytest.approx((1.0, 1 - half, 1 + half, df))


@pytest.mark.parametrize(
    ("runs", "std", "paper_n", "expected"),
    [
        ([80.0], 1.0, 5, Difference(1.0)),
        ([79.5, 80.5], None, 5, Difference(1.0)),
        ([79.5, 80.5], 1.0, 1, Difference(1.0)),
        ([80.0, 80.0], 0.0, 5, Difference(1.0, 1.0, 1.0, math.inf, 0.0)),
    ],
)
def test_no_spread_on_one_side_is_no_interval(runs, std, paper_n, expected):
    assert intervals.difference_from_paper([runs], 79.0, [std], paper_n) == expected


def test_what_a_difference_from_the_paper_needs():
    with pytest.raises(ValueError, match="2 tasks and 1 printed deviations"):
        intervals.difference_from_paper([[80.0], [81.0]], 80.0, [1.0], 5)
    assert intervals.sample_std(2.0, 5) == pytest.approx(2 * math.sqrt(5 / 4))
    for std, n in ((1.0, 1), (-1.0, 3), (math.nan, 3)):
        with pytest.raises(ValueError, match="at least 2 runs"):
            intervals.sample_std(std, n)


@pytest.mark.parametrize(
    ("difference", "options", "expected"),
    [
        (Difference(0.0), {}, "inconclusive"),
        (Difference(2.0, 0.5, 3.5), {}, "differs"),
        (Difference(-2.0, -3.5, -0.5), {}, "differs"),
        (Difference(0.3, 0.1, 0.5), {}, "differs"),  # small but sure
        (Difference(0.04, 0.02, 0.06), {}, "agrees"),  # excludes 0 within the rounding of the print
        (Difference(0.2, -0.6, 1.0), {}, "agrees"),
        (Difference(0.3, -0.5, 1.1), {}, "inconclusive"),
        (Difference(0.3, -0.5, 1.1), {"margin": 1.5}, "agrees"),
        (Difference(-0.3, -1.1, 0.5), {}, "inconclusive"),
    ],
)
def test_verdict(difference, options, expected):
    assert intervals.verdict(difference, rounding=0.05, **options) == expected


def test_vocabulary_is_complete():
    assert set(verdicts.VERDICTS) == set(verdicts.MARKS) == set(verdicts.MEANINGS)
    assert len(set(verdicts.MARKS.values())) == len(verdicts.VERDICTS)


@pytest.mark.parametrize(
    ("difference", "p", "lower", "expected"),
    [
        (1.0, 0.05, False, verdicts.FIRST_BETTER),
        (-1.0, 0.01, False, verdicts.SECOND_BETTER),
        (-1.0, 0.01, True, verdicts.FIRST_BETTER),
        (1.0, 0.01, True, verdicts.SECOND_BETTER),
        (9.0, 0.051, False, verdicts.NOT_SEPARATED),
        (9.0, None, True, verdicts.NOT_SEPARATED),
    ],
)
def test_verdict_of_a_test(difference, p, lower, expected):
    assert verdicts.of_test(difference, p, lower_is_better=lower) == expected
