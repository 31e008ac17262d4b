"""Intervals and verdicts against scipy, hand calculations and simulations."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from finetune.stats import intervals as stats
from finetune.stats import verdicts
from finetune.stats.intervals import Difference


def test_mean_interval_equals_scipys():
    values = [59.1, 60.2, 57.9, 61.0, 58.4]
    ours = stats.mean_interval(values)
    theirs = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (ours.mean, ours.low, ours.high) == pytest.approx((np.mean(values), *theirs), abs=1e-10)
    assert ours.n == 5


def test_mean_interval_by_hand():
    # Two runs: t(1) at 97.5 % is 12.7062, the deviation √2 · 1, its error of the mean 1.
    assert stats.mean_interval([80.0, 82.0]) == stats.Estimate(
        81.0, pytest.approx(81 - 12.7062, abs=1e-4), pytest.approx(81 + 12.7062, abs=1e-4), 2
    )


def test_one_run_has_no_interval():
    assert stats.mean_interval([80.5]) == stats.Estimate(80.5, None, None, 1)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0]]])
def test_mean_interval_refuses(values):
    with pytest.raises(ValueError, match="at least one finite value"):
        stats.mean_interval(values)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_confidence_is_a_fraction(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.mean_interval([1.0, 2.0], confidence)


def test_bootstrap_of_one_task_equals_scipys():
    values = np.random.default_rng(3).normal(80, 2, 12)
    ours = stats.stratified_bootstrap(values[:, None], seed=0, samples=50_000)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=50_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_bootstrap_enumerated_by_hand():
    # Two tasks of two runs: each task's resampled mean is low, middle, middle, high with probability 1/4 each.
    scores = np.array([[0.0, 10.0], [2.0, 30.0]])
    means = np.add.outer([0, 1, 1, 2], [10, 20, 20, 30]).ravel() / 2
    ours = stats.stratified_bootstrap(scores, seed=0, confidence=0.8)
    assert ours.mean == means.mean() == 10.5
    assert (ours.low, ours.high) == (np.quantile(means, 0.1), np.quantile(means, 0.9))


def test_bootstrap_resamples_within_tasks_only():
    # Tasks differ by 50 points and runs not at all: no resample can move the average.
    ours = stats.stratified_bootstrap([[40.0, 90.0], [40.0, 90.0]], seed=0)
    assert (ours.low, ours.mean, ours.high, ours.n) == (65.0, 65.0, 65.0, 2)


def test_bootstrap_is_deterministic_and_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()
    scores = np.random.default_rng(0).normal(80, 2, (5, 8))
    assert stats.stratified_bootstrap(scores, seed=7) == stats.stratified_bootstrap(scores, seed=7)
    assert stats.stratified_bootstrap(scores, seed=7) != stats.stratified_bootstrap(scores, seed=8)
    assert (np.random.get_state()[1] == before).all()


def test_bootstrap_with_a_missing_run():
    scores = np.array([[80.0, 60.0], [82.0, 62.0], [84.0, np.nan]])
    ours = stats.stratified_bootstrap(scores, seed=0)
    assert (ours.mean, ours.n) == (71.5, 2)
    assert 70 <= ours.low < 71.5 < ours.high <= 73
    assert stats.stratified_bootstrap(scores[1:], seed=0) == stats.Estimate(72.5, None, None, 1)


@pytest.mark.parametrize("scores", [[], [1.0, 2.0], [[np.nan, 1.0]], [[np.inf, 1.0]]])
def test_bootstrap_refuses(scores):
    with pytest.raises(ValueError, match="needed|pass a matrix"):
        stats.stratified_bootstrap(scores, seed=0)


def test_welch_equals_scipys():
    ours, theirs = np.array([86.1, 87.4, 85.2, 88.0]), np.array([84.0, 84.5, 83.1])
    found = stats.difference_from_paper([ours], theirs.mean(), [theirs.std()], paper_n=3)  # numpy's std, as printed
    test = scipy_stats.ttest_ind(ours, theirs, equal_var=False)
    low, high = test.confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((ours.mean() - theirs.mean(), low, high), abs=1e-10)
    assert found.df == pytest.approx(test.df)


def test_sample_std_by_hand():
    assert stats.sample_std(2.0, 5) == pytest.approx(2 * math.sqrt(5 / 4))
    for std, n in ((1.0, 1), (-1.0, 3), (math.nan, 3)):
        with pytest.raises(ValueError, match="at least 2 runs"):
            stats.sample_std(std, n)


def test_average_difference_by_hand():
    # Two tasks, sample variances 2 and 8 (n = 2), paper's population deviation 1 twice with n = 5: variance 5/4.
    found = stats.difference_from_paper([[79.0, 81.0], [58.0, 62.0]], 69.0, [1.0, 1.0], paper_n=5)
    parts = [(2 / 2 / 4, 1), (8 / 2 / 4, 1), (1.25 / 5 / 4, 4), (1.25 / 5 / 4, 4)]
    total = sum(part for part, _ in parts)
    df = total**2 / sum(part**2 / freedom for part, freedom in parts)
    half = scipy_stats.t.ppf(0.975, df) * math.sqrt(total)
    assert (found.value, found.low, found.high, found.df) == pytest.approx((1.0, 1 - half, 1 + half, df))


def test_no_spread_on_one_side_is_no_interval():
    assert stats.difference_from_paper([[80.0]], 79.0, [1.0], 5) == Difference(1.0)
    assert stats.difference_from_paper([[80.0, 81.0]], 79.5, [None], 5) == Difference(1.0)
    assert stats.difference_from_paper([[80.0, 81.0]], 79.5, [1.0], 1) == Difference(1.0)


def test_no_variance_at_all_is_an_interval_of_width_zero():
    assert stats.difference_from_paper([[80.0, 80.0]], 79.0, [0.0], 5) == Difference(1.0, 1.0, 1.0, math.inf)


def test_difference_wants_one_deviation_per_task():
    with pytest.raises(ValueError, match="2 tasks and 1 printed deviations"):
        stats.difference_from_paper([[80.0], [81.0]], 80.0, [1.0], 5)


@pytest.mark.parametrize(("tasks", "deviation"), [(1, 1.0), (1, 3.0), (8, 1.0)])
def test_welch_interval_covers_the_true_difference(tasks, deviation):
    generator = np.random.default_rng(tasks)
    covered = 0
    for _ in range(1000):
        ours = generator.normal(80, 1, (tasks, 5))
        paper = generator.normal(79, deviation, (tasks, 5))
        found = stats.difference_from_paper(list(ours), paper.mean(), list(paper.std(axis=1)), paper_n=5)
        covered += found.low <= 1.0 <= found.high
    assert 0.93 <= covered / 1000 <= 0.975


def test_student_interval_covers_the_true_mean():
    generator = np.random.default_rng(0)
    found = [stats.mean_interval(generator.normal(80, 2, 3)) for _ in range(1000)]
    assert 0.93 <= np.mean([one.low <= 80 <= one.high for one in found]) <= 0.97


def test_bootstrap_interval_covers_somewhat_less_with_five_runs():
    # The reason why verdicts rest on Welch's interval.
    generator = np.random.default_rng(0)
    found = [stats.stratified_bootstrap(generator.normal(80, 2, (5, 8)), seed=i, samples=1000) for i in range(300)]
    assert 0.85 <= np.mean([one.low <= 80 <= one.high for one in found]) <= 0.95


@pytest.mark.parametrize(
    ("difference", "options", "expected"),
    [
        (None, {"ran": False}, "not run"),
        (None, {"ran": False, "comparable": False}, "not run"),
        (Difference(0.0, -0.1, 0.1), {"comparable": False}, "not comparable"),
        (None, {}, "not comparable"),
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
    assert stats.verdict(difference, rounding=0.05, **options) == expected
    assert expected in verdicts.VERDICTS


def test_within_factor():
    assert stats.within_factor(2e-5, 1e-5) and stats.within_factor(1e-5, 2e-5) and stats.within_factor(3e-6, 3e-6)
    assert not stats.within_factor(2.01e-5, 1e-5) and not stats.within_factor(1e-5, 2.01e-5)
    assert stats.within_factor(2.9e-5, 1e-5, factor=3)
    with pytest.raises(ValueError, match="positive values"):
        stats.within_factor(0.0, 1e-5)
