"""Sign flips, Holm, and the probability of improvement, against references."""

import itertools

import numpy as np
import pytest
from scipy import stats as distributions

from finetune.stats import paired

TASKS = [[1.0, 2.5, 0.5, -0.25], [0.75, 3.0, 1.5]]


def test_sign_flips_over_tasks_try_every_pattern():
    weighted = [d / 4 / 2 for d in TASKS[0]] + [d / 3 / 2 for d in TASKS[1]]
    patterns = itertools.product((1, -1), repeat=7)
    sums = [abs(sum(s * w for s, w in zip(signs, weighted, strict=True))) for signs in patterns]
    found = paired.sign_flip_test(TASKS, seed=0)
    assert found.p == pytest.approx(sum(value >= abs(sum(weighted)) - 1e-12 for value in sums) / 2**7)
    assert found.least == 2 / 2**7


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([0.1, 0.2, 0.3], 0.25),  # the least that three pairs allow
        ([-0.1, -0.2, -0.3], 0.25),  # two-sided
        ([0.0, 0.0, 0.0], 1.0),
        ([5.0], 1.0),
        # 0.1, -0.1 and -0.4 but for rounding: six of the eight patterns reach 0.4, some of them by a tie.
        ([83.0 - 82.9, 84.1 - 84.2, 61.4 - 61.8], 0.75),
    ],
)
def test_sign_flips_by_hand(differences, p):
    assert paired.sign_flip_test([differences], seed=0).p == p


def test_drawn_sign_flips_agree_with_all_of_them(monkeypatch):
    generator = np.random.default_rng(1)
    tasks = [generator.normal(0.5, 1.0, 5) for _ in range(3)]
    exact = paired.sign_flip_test(tasks, seed=0)
    monkeypatch.setattr(paired, "EXACT_PAIRS", 10)
    drawn = paired.sign_flip_test(tasks, seed=0, samples=20_000)
    assert drawn.p == pytest.approx(exact.p, abs=0.01) and drawn.least == 2 / 20_001 and exact.least == 2 / 2**15
    assert drawn.p != exact.p and drawn == paired.sign_flip_test(tasks, seed=0, samples=20_000)
    never_zero = paired.sign_flip_test([np.full(40, 1.0)], seed=0, samples=1000)
    assert never_zero.p == never_zero.least == 2 / 1001


def test_holm():
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
    assert paired.holm([]) == []


def test_probability_of_improvement_is_the_mean_mann_whitney_share():
    generator = np.random.default_rng(0)
    first = [generator.normal(0.5, 1, 5).round(1) for _ in range(3)]
    second = [generator.normal(0, 1, 4).round(1) for _ in range(3)]
    shares = [distributions.mannwhitneyu(x, y).statistic / 20 for x, y in zip(first, second, strict=True)]
    found = paired.probability_of_improvement(first, second, seed=0)
    assert found.mean == pytest.approx(np.mean(shares)) and found.low < found.mean < found.high and found.n == 4
    assert paired.probability_of_improvement([[1.0, 1.0]], [[1.0, 1.0]], seed=0).mean == 0.5
    assert paired.probability_of_improvement([[2.0, 3.0]], [[1.0, 1.5]], seed=0).low == 1.0
    assert paired.probability_of_improvement([[2.0]], [[1.0, 1.5]], seed=0).low is None
    with pytest.raises(ValueError, match="1 and 2 tasks"):
        paired.probability_of_improvement([[1.0]], [[1.0], [2.0]], seed=0)
