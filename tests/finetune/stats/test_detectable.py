"""Least detectable differences against tables of power, and against tests of made-up runs."""

import math

import numpy as np
import pytest
from scipy import stats

from finetune.stats.detectable import EXAMPLE_VARIANCE, Part, least_detectable, planned_parts, pooled
from finetune.stats.multibootstrap import Draws


@pytest.mark.parametrize(
    ("n", "effect"),
    [(3, 3.2640), (5, 1.6820), (10, 0.9961), (30, 0.5292)],
)
def test_of_seeds_alone_it_is_the_paired_t_test_s(n, effect):
    """Effects are those of `statsmodels.stats.power.TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)`."""
    assert least_detectable([Part(1 / n, n - 1)], 0.0) == pytest.approx(effect, abs=1e-4)


def test_of_examples_alone_it_is_the_normal_test_s():
    found = least_detectable([Part(0.0, 4)], 4.0)
    assert found == pytest.approx(2 * (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)))
    assert least_detectable([Part(4.0, 1e6)], 0.0) == pytest.approx(found, rel=1e-4)
    assert least_detectable([Part(0.0, 4)], 0.0) == 0.0


def test_seeds_of_several_tasks_have_satterthwaite_s_degrees_of_freedom():
    assert pooled([Part(0.5, 4), Part(0.5, 4)]) == Part(1.0, 8)
    assert pooled([Part(0.5, 4), Part(0.0, 4)]) == Part(0.5, 4)
    assert least_detectable([Part(0.5, 4), Part(0.5, 0)], 1.0) is None
    with pytest.raises(ValueError, match=r"power=0\.01"):
        least_detectable([Part(0.5, 4)], 1.0, power=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("df", "tasks", "share"), [(2, 1, 0.5), (4, 1, 0.75), (2, 4, 0.5), (4, 4, 1.0)])
def test_the_test_finds_it_with_the_power_promised(df, tasks, share):
    """Of seeds that make a share of the variance, and examples: the test of `multibootstrap`, many times."""
    rng, samples = np.random.default_rng(0), 2000
    examples = rng.permutation(stats.norm.ppf((np.arange(samples) + 0.5) / samples)) * math.sqrt(1 - share)
    least = least_detectable([Part(share / tasks, df)] * tasks, 1 - share)
    found = wrong = 0.0
    for _ in range(1000):
        parts = tuple(Part(share / tasks * v / df, df) for v in rng.chisquare(df, tasks))
        drawn, values = Draws(0.0, examples, examples, parts, df + 1).drawn(), rng.normal(size=50)
        low, high = np.percentile(drawn, [2.5, 97.5])
        found += ((values + least > high) | (values + least < low)).mean() / 1000
        wrong += ((values > high) | (values < low)).mean() / 1000
    assert 0.74 < found < 0.83
    assert 0.02 < wrong < 0.06


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_paired_t_test_finds_it_with_the_power_promised(seeds):
    spread, rng = 1.3, np.random.default_rng(0)
    part, _ = planned_parts(
        spread=spread, seeds=seeds, variance=0.0, examples=100, seed_correlation=0.5, example_correlation=0.0
    )
    least = least_detectable([part], 0.0)
    shared, own = (
        rng.normal(0, spread / math.sqrt(2), (2, 20_000, seeds)),
        rng.normal(0, spread / math.sqrt(2), (2, 20_000, seeds)),
    )
    first, second = least + shared[0] + own[0], shared[0] + own[1]
    assert (stats.ttest_rel(first, second, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(("metric", "score"), [("accuracy", 0.8), ("matthews_correlation", 0.6), ("pearson", 0.9)])
def test_the_variance_of_an_example_is_that_of_made_up_scores(metric, score):
    rng, n = np.random.default_rng(1), 400
    if metric == "pearson":
        x = rng.normal(size=(3000, n))
        y = score * x + math.sqrt(1 - score**2) * rng.normal(size=(3000, n))
        found = [np.corrcoef(*pair)[0, 1] for pair in zip(x, y, strict=True)]
    else:
        right = score if metric == "accuracy" else (score + 1) / 2
        labels = np.arange(n) % 2
        predictions = np.where(rng.random((3000, n)) < right, labels, 1 - labels)
        if metric == "accuracy":
            found = (predictions == labels).mean(axis=1)
        else:
            found = [np.corrcoef(one, labels)[0, 1] for one in predictions]
    assert n * np.var(found) == pytest.approx(EXAMPLE_VARIANCE[metric](score), rel=0.08)


def test_what_is_planned_is_refused_if_it_cannot_be():
    plan = {"spread": 1.0, "seeds": 5, "variance": 1.0, "examples": 10}
    with pytest.raises(ValueError, match="0 examples"):
        planned_parts(**plan | {"examples": 0}, seed_correlation=0.0, example_correlation=0.0)
    with pytest.raises(ValueError, match="correlations 0.0 and 2.0"):
        planned_parts(**plan, seed_correlation=0.0, example_correlation=2.0)
