"""Seeds and examples resampled together: against a literal loop, scipy's t tests, and how often intervals cover."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, matthews_corrcoef

from finetune.stats import verdicts
from finetune.stats.intervals import mean_over_tasks
from finetune.stats.multibootstrap import average, difference, equivalence
from finetune.stats.resampled import METRICS, Resampled, resample_scores

LITERAL = {
    "accuracy": lambda p, y: accuracy_score(y, p),
    "matthews_correlation": lambda p, y: matthews_corrcoef(y, p),
    "pearson": lambda p, y: stats.pearsonr(p, y).statistic if np.ptp(p) and np.ptp(y) else 0.0,
    "loss": lambda p, y: p.sum() / y.sum(),
}


def made(metric, runs=3, examples=40, seed=0):
    rng = np.random.default_rng(seed)
    if metric == "loss":
        labels = rng.integers(1, 30, examples)
        return (labels * rng.normal(3.0, 0.2, (runs, examples))).astype(np.float32), labels
    if metric == "pearson":
        labels = rng.uniform(0, 5, examples).astype(np.float32)
        return (labels + rng.normal(0, 1, (runs, examples))).astype(np.float32), labels
    classes = 3 if metric == "accuracy" else 2
    labels = rng.integers(0, classes, examples).astype(np.int8)
    predictions = np.where(rng.random((runs, examples)) < 0.7, labels, rng.integers(0, classes, (runs, examples)))
    predictions[-1] = 1  # a constant one
    return predictions.astype(np.int8), labels


@pytest.mark.filterwarnings("ignore")  # of sklearn, on resamples of one class
@pytest.mark.parametrize("metric", LITERAL)
@pytest.mark.parametrize("cells", [4_000_000, 130])
def test_metrics_of_resamples_are_those_of_the_rows_drawn(metric, cells, monkeypatch):
    monkeypatch.setattr("finetune.stats.resampled._CELLS", cells)  # in one block, and in blocks of three resamples
    predictions, labels = made(metric)
    found = resample_scores(metric, predictions, labels, seed=[1, 2], samples=7)
    rng, rows, block = np.random.default_rng([1, 2]), [], min(7, cells // 40)
    for start in range(0, 7, block):
        rows += [*rng.integers(0, 40, (min(block, 7 - start), 40))]
    literal = [[LITERAL[metric](run[drawn], labels[drawn]) for run in predictions] for drawn in rows]
    assert found.replicates == pytest.approx(np.array(literal), abs=1e-6)
    assert found.scores == pytest.approx([LITERAL[metric](run, labels) for run in predictions], abs=1e-6)


def test_correlations_that_are_not_defined_are_0():
    labels = np.linspace(0, 1, 9)
    predictions = np.stack([labels, np.full(9, 0.1 + 0.2), np.where(labels > 0.5, np.nan, labels)])
    found = resample_scores("pearson", predictions, labels, seed=0, samples=50)
    assert found.scores == pytest.approx([1.0, 0.0, 0.0])
    assert not found.replicates[:, 1:].any()
    one = resample_scores("matthews_correlation", np.ones((1, 9)), np.ones(9), seed=0, samples=2)
    assert one.scores == [0.0]


def test_more_than_two_classes_have_sklearn_s_matthews_correlation():
    predictions, labels = made("accuracy")
    found = METRICS["matthews_correlation"](np.ones((1, 40)), predictions, labels)[0]
    assert found == pytest.approx([matthews_corrcoef(labels, run) for run in predictions])


@pytest.mark.parametrize("paired", [True, False])
def test_the_multi_bootstrap_is_the_literal_one(paired):
    """The same distribution as drawing seeds and rows one by one: mean and quantiles within Monte Carlo error."""
    predictions, labels = made("accuracy", runs=8, examples=60)
    right = predictions[:6] == labels
    found = resample_scores("accuracy", predictions[:6], labels, seed=3, samples=4000)
    draws = difference(found.of([0, 1, 2]), found.of([3, 4, 5]), paired=paired, seed=4)
    rng, literal = np.random.default_rng(5), []
    for _ in range(1500):
        rows = rng.integers(0, 60, 60)
        first = rng.integers(0, 3, 3)
        second = first if paired else rng.integers(0, 3, 3)
        score = [run[rows].mean() for run in right]
        literal.append(np.mean([score[s] for s in first]) - np.mean([score[3 + s] for s in second]))
    scores = right.mean(axis=1)
    assert draws.value == pytest.approx(np.mean(scores[:3]) - np.mean(scores[3:]))
    assert draws.resampled.std() == pytest.approx(np.std(literal), rel=0.08)
    wanted = np.quantile(literal, [0.025, 0.25, 0.5, 0.75, 0.975])
    assert np.quantile(draws.resampled, [0.025, 0.25, 0.5, 0.75, 0.975]) == pytest.approx(wanted, abs=0.02)
    assert equivalence(draws, None).bootstrap == pytest.approx(tuple(np.quantile(draws.resampled, [0.025, 0.975])))


def test_the_same_seed_gives_the_same_draws():
    predictions, labels = made("accuracy", runs=4)
    found = [resample_scores("accuracy", predictions, labels, seed=s, samples=50) for s in (1, 1, 2)]
    one, same, other = (difference(f.of([0, 1]), f.of([2, 3]), paired=True, seed=7).drawn() for f in found)
    assert (one == same).all()
    assert (one != other).any()


def seeds_alone(first, second, samples=40_000):
    """Two methods whose examples are all alike: seeds are the only chance."""
    return [Resampled(np.array(x), np.tile(np.array(x), (samples, 1))) for x in (first, second)]


FIRST, SECOND = [81.0, 82.5, 80.7, 81.9, 82.2], [80.9, 82.0, 81.1, 81.5, 81.6]


@pytest.mark.parametrize("margin", [0.3, 0.6, 1.5])
def test_without_examples_it_is_the_t_test_and_its_two_one_sided_tests(margin):
    pair = seeds_alone(FIRST, SECOND)
    found = equivalence(difference(*pair, paired=True, seed=0), margin)
    differences = np.subtract(FIRST, SECOND)
    whole = stats.ttest_1samp(differences, 0.0)
    sides = [
        stats.ttest_1samp(differences, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(differences, margin, alternative="less").pvalue,
    ]
    assert found.p == pytest.approx(whole.pvalue)
    assert found.p_equal == pytest.approx(max(sides))
    interval = whole.confidence_interval(verdicts.CONFIDENCE)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=2e-3)
    # The usual rule: equal at 5 % where the 90 % interval lies within the margin.
    inner = whole.confidence_interval(0.9)
    assert (found.p_equal < 0.05) == (-margin < inner.low and inner.high < margin)


def test_shares_beyond_a_bound_are_those_of_the_draws():
    predictions, labels = made("accuracy", runs=6, examples=200)
    found = resample_scores("accuracy", predictions, labels, seed=0, samples=4000)
    draws = difference(found.of([0, 1, 2]), found.of([2, 3, 4]), paired=True, seed=0)
    drawn, rng = draws.drawn(), np.random.default_rng(0)
    literal = rng.choice(draws.examples, 200_000) + math.sqrt(draws.parts[0].variance) * rng.standard_t(2, 200_000)
    for bound in (-0.05, 0.0, 0.02):
        for side in (-1, 1):
            assert draws.beyond(bound, side) == pytest.approx((side * (literal - bound) > 0).mean(), abs=0.005)
            assert draws.beyond(bound, side) == pytest.approx((side * (drawn - bound) > 0).mean(), abs=0.02)
    far = equivalence(difference(*seeds_alone([90.0, 90.1, 90.2], [1.0, 1.2, 1.1], 10), paired=True, seed=0), None)
    assert 0 < far.p < 1e-4  # of ten resamples
    same = equivalence(difference(*seeds_alone([90.0] * 3, [1.0] * 3, 10), paired=True, seed=0), None)
    assert same.p == pytest.approx(2 / 11)


def test_unpaired_seeds_have_the_variance_of_both():
    first, second = seeds_alone(FIRST, SECOND)
    found = difference(first, second, paired=False, seed=0)
    parts = [np.var(x, ddof=1) / 5 for x in (FIRST, SECOND)]
    assert [part.variance for part in found.parts] == pytest.approx(parts)
    assert equivalence(found, None).p == pytest.approx(stats.ttest_ind(FIRST, SECOND, equal_var=False).pvalue)
    assert found.resampled.var() == pytest.approx(4 / 5 * sum(parts), rel=0.05)
    with pytest.raises(ValueError, match="4 and 5 runs"):
        difference(first.of(range(4)), second, paired=True, seed=0)


def test_one_seed_says_nothing():
    predictions, labels = made("accuracy", runs=2)
    found = resample_scores("accuracy", predictions, labels, seed=0, samples=100)
    draws = difference(found.of([0]), found.of([1]), paired=True, seed=0)
    said = equivalence(draws, 1.0)
    assert (said.low, said.p, said.p_equal, said.detectable, said.seeds) == (None, None, None, None, 1)
    assert said.bootstrap[0] < said.value < said.bootstrap[1]
    assert verdicts.of_equivalence(said.value, said.p, said.p_equal) == verdicts.UNDECIDED


def test_the_average_weighs_tasks_alike():
    one = difference(*seeds_alone(FIRST, SECOND), paired=True, seed=0)
    two = difference(*seeds_alone([3.0, 5.0, 4.0], [2.0, 4.5, 4.5]), paired=True, seed=1)
    both = average([one, two])
    found, tasks = equivalence(both, None), [np.subtract(FIRST, SECOND), np.array([1.0, 0.5, -0.5])]
    by_hand = mean_over_tasks(tasks)  # seeds alone, with Satterthwaite's degrees of freedom
    assert (found.value, found.p) == (pytest.approx(by_hand.value), pytest.approx(by_hand.p))
    assert (found.low, found.high) == pytest.approx((by_hand.low, by_hand.high), abs=2e-3)
    assert both.resampled == pytest.approx((one.resampled + two.resampled) / 2)
    assert found.seeds == 3


@pytest.mark.parametrize(
    ("value", "p", "p_equal", "lower_is_better", "verdict"),
    [
        (2.0, 0.01, 0.9, False, verdicts.BETTER),
        (-2.0, 0.01, 0.9, False, verdicts.WORSE),
        (-2.0, 0.01, 0.9, True, verdicts.BETTER),
        (0.1, 0.5, 0.04, False, verdicts.EQUAL),
        (0.4, 0.01, 0.04, False, verdicts.EQUAL),  # there, and too small to matter
        (0.4, 0.06, 0.06, False, verdicts.UNDECIDED),
        (0.4, 0.06, None, False, verdicts.UNDECIDED),
    ],
)
def test_verdicts_of_equivalence(value, p, p_equal, lower_is_better, verdict):
    assert verdicts.of_equivalence(value, p, p_equal, lower_is_better=lower_is_better) == verdict


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan])
def test_a_margin_is_above_0(margin):
    with pytest.raises(ValueError, match="a number above 0"):
        equivalence(difference(*seeds_alone(FIRST, SECOND, 10), paired=True, seed=0), margin)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "examples", "spread"), [(3, 300, 0.15), (5, 300, 0.02), (5, 1000, 0.5)])
def test_intervals_cover_the_true_difference(seeds, examples, spread):
    """Probit model of hits: an ease of each example, of it to each method, of each run, and chance.

    The interval that verdicts rest on covers about 95 %; the plain percentile interval does not where seeds differ.
    """
    rng, shift, hits, percentile, repeats = np.random.default_rng(0), 0.15, 0, 0, 400
    whole = math.sqrt(1.5**2 + 0.7**2 + spread**2 + 0.5**2)
    truth = stats.norm.cdf((1 + shift) / whole) - stats.norm.cdf(1 / whole)
    for repeat in range(repeats):
        ease = rng.normal(1.0, 1.5, examples)
        runs = [ease + own + rng.normal(0, 0.7, examples) + rng.normal(0, spread, (seeds, 1)) for own in (shift, 0.0)]
        right = np.concatenate([one + rng.normal(0, 0.5, one.shape) for one in runs]) > 0
        found = resample_scores("accuracy", right, np.ones(examples, bool), seed=repeat, samples=1000)
        said = equivalence(
            difference(found.of(range(seeds)), found.of(range(seeds, 2 * seeds)), paired=True, seed=repeat), None
        )
        hits += said.low <= truth <= said.high
        percentile += said.bootstrap[0] <= truth <= said.bootstrap[1]
    assert 0.92 <= hits / repeats <= 0.995
    if spread == 0.5:
        assert percentile / repeats < 0.9
