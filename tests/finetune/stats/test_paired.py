"""Paired differences, sign flips, Holm, and rliable's measures, against references."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as distributions

from finetune.stats import paired

TASKS = [[1.0, 2.5, 0.5, -0.25], [0.75, 3.0, 1.5]]


def test_difference_of_one_task_is_students_paired_interval():
    x, y = np.array([61.0, 62.5, 60.5, 63.0, 59.0]), np.array([60.0, 61.0, 61.5, 60.0, 58.5])
    found = paired.paired_difference([x - y])
    reference = distributions.ttest_rel(x, y).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx(((x - y).mean(), *reference))
    assert found.df == pytest.approx(4)


def test_difference_over_tasks_weighs_tasks_alike():
    found = paired.paired_difference(TASKS)
    means, variances = [np.mean(t) for t in TASKS], [np.var(t, ddof=1) / len(t) / 4 for t in TASKS]
    df = sum(variances) ** 2 / (variances[0] ** 2 / 3 + variances[1] ** 2 / 2)
    half = distributions.t.ppf(0.975, df) * math.sqrt(sum(variances))
    assert found.value == pytest.approx(np.mean(means)) and found.df == pytest.approx(df)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


def test_difference_without_spread():
    assert paired.paired_difference([[1.0, 2.0], [3.0]]).low is None
    same = paired.paired_difference([[0.5, 0.5], [1.0, 1.0]])
    assert (same.value, same.low, same.high) == (0.75, 0.75, 0.75)


def test_sign_flips_of_one_task_are_scipys_permutation_test():
    x = np.array(TASKS[0])
    reference = distributions.permutation_test(
        (x, np.zeros_like(x)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    )
    found = paired.sign_flip_test([x], seed=0)
    assert found.exact and found.p == pytest.approx(reference.pvalue)
    assert found.least == 2 / 2**4


def test_sign_flips_over_tasks_try_every_pattern():
    weighted = [d / 4 / 2 for d in TASKS[0]] + [d / 3 / 2 for d in TASKS[1]]
    observed = abs(sum(weighted))
    sums = [abs(sum(s * w for s, w in zip(signs, weighted, strict=True))) for signs in
            itertools.product((1, -1), repeat=7)]  # fmt: skip
    found = paired.sign_flip_test(TASKS, seed=0)
    assert found.p == pytest.approx(sum(value >= observed - 1e-12 for value in sums) / 2**7)
    assert paired.sign_flip_test([[0.0, 0.0, 0.0]], seed=0).p == 1.0
    assert paired.sign_flip_test([[0.1, 0.2, 0.3]], seed=0).p == 0.25  # the least that three pairs allow


def test_drawn_sign_flips_agree_with_all_of_them(monkeypatch):
    generator = np.random.default_rng(1)
    tasks = [generator.normal(0.5, 1.0, 5) for _ in range(3)]
    exact = paired.sign_flip_test(tasks, seed=0)
    monkeypatch.setattr(paired, "EXACT_PAIRS", 10)
    drawn = paired.sign_flip_test(tasks, seed=0, samples=50_000)
    assert exact.exact and not drawn.exact and drawn.p == pytest.approx(exact.p, abs=0.01)
    assert drawn.p != exact.p and drawn.least == 1 / 50_001
    assert paired.sign_flip_test([np.full(40, 1.0)], seed=0, samples=1000).p == 1 / 1001  # never 0


def test_sign_flips_keep_their_level():
    generator = np.random.default_rng(0)
    ps = [paired.sign_flip_test(generator.standard_t(2, (2, 4)), seed=0).p for _ in range(1000)]
    assert 0.03 <= np.mean(np.array(ps) <= 0.05) <= 0.065


def test_holm():
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
    assert paired.holm([]) == []


@pytest.mark.parametrize("n", [3, 4, 7, 8, 17])
def test_interquartile_mean_is_scipys_trimmed_mean(n):
    values = np.random.default_rng(n).normal(size=(5, n))
    assert paired.interquartile_mean(values) == pytest.approx(distributions.trim_mean(values, 0.25, axis=1))


@pytest.mark.parametrize("iqm", [False, True])
def test_bootstrap_draws_within_tasks(iqm):
    # Two tasks far apart: resampling across tasks would give an interval of some 20 points.
    tasks = [[10.0, 11.0, 12.0, 13.0], [80.0, 81.0, 82.0, 83.0]]
    found = paired.bootstrap(tasks, seed=0, iqm=iqm)
    assert found.mean == pytest.approx(46.5) and found.n == 4
    assert found.low < found.mean < found.high
    assert found.high - found.low < 3 if not iqm else found.high - found.low < 6
    assert paired.bootstrap(tasks, seed=0, iqm=iqm) == found
    assert paired.bootstrap([[1.0], [2.0, 3.0]], seed=0, iqm=iqm).low is None


def test_bootstrap_of_the_mean_has_its_standard_error():
    tasks = [np.random.default_rng(task).normal(size=6) for task in range(4)]
    found = paired.bootstrap(tasks, seed=0, samples=40_000)
    error = math.sqrt(sum(np.var(task) / 6 for task in tasks)) / 4
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.03)


def test_probability_of_improvement_is_the_mean_mann_whitney_share():
    generator = np.random.default_rng(0)
    first = [generator.normal(0.5, 1, 5).round(1) for _ in range(3)]
    second = [generator.normal(0, 1, 4).round(1) for _ in range(3)]
    shares = [distributions.mannwhitneyu(x, y).statistic / 20 for x, y in zip(first, second, strict=True)]
    found = paired.probability_of_improvement(first, second, seed=0)
    assert found.mean == pytest.approx(np.mean(shares)) and found.low < found.mean < found.high
    assert paired.probability_of_improvement([[1.0, 1.0]], [[1.0, 1.0]], seed=0).mean == 0.5
    assert paired.probability_of_improvement([[2.0, 3.0]], [[1.0, 1.5]], seed=0).low == 1.0


@pytest.mark.parametrize("tasks", [[], [[]], [[1.0, math.nan]], [[[1.0]]]])
def test_bad_input(tasks):
    for call in (paired.paired_difference, lambda t: paired.sign_flip_test(t, seed=0)):
        with pytest.raises(ValueError, match="at least one finite value"):
            call(tasks)
    with pytest.raises(ValueError, match="1 and 2 tasks"):
        paired.probability_of_improvement([[1.0]], [[1.0], [2.0]], seed=0)
