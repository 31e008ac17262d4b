"""Metrics against formulas written out here, and against scikit-learn and scipy."""

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from finetune.training import metrics

LABELS = np.array([0, 0, 1, 1, 1, 0, 1, 0, 1, 1])
FOUND = np.array([0, 1, 1, 1, 0, 0, 1, 0, 0, 1])


def confusion(found, labels):
    return tuple(int(((found == f) & (labels == y)).sum()) for f, y in ((1, 1), (0, 0), (1, 0), (0, 1)))


def test_classification_metrics_by_hand():
    tp, tn, fp, fn = confusion(FOUND, LABELS)
    assert (tp, tn, fp, fn) == (4, 3, 1, 2)
    assert metrics.compute("accuracy", FOUND, LABELS) == pytest.approx(7 / 10)
    assert metrics.compute("f1", FOUND, LABELS) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    denominator = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert metrics.compute("matthews_correlation", FOUND, LABELS) == pytest.approx((tp * tn - fp * fn) / denominator)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_the_libraries(seed):
    draw = np.random.default_rng(seed)
    labels, found = draw.integers(0, 2, 50), draw.integers(0, 2, 50)
    assert metrics.compute("accuracy", found, labels) == accuracy_score(labels, found)
    assert metrics.compute("matthews_correlation", found, labels) == pytest.approx(matthews_corrcoef(labels, found))
    assert metrics.compute("f1", found, labels) == pytest.approx(f1_score(labels, found))
    targets, values = draw.uniform(0, 5, 50), draw.normal(size=50)
    assert metrics.compute("pearson", values, targets) == pytest.approx(pearsonr(values, targets)[0])
    assert metrics.compute("pearson", values, targets) == pytest.approx(np.corrcoef(values, targets)[0, 1])


def test_three_classes():
    labels, found = np.array([0, 1, 2, 2, 1, 0]), np.array([0, 2, 2, 2, 1, 1])
    assert metrics.compute("accuracy", found, labels) == pytest.approx(4 / 6)
    assert metrics.compute("matthews_correlation", found, labels) == pytest.approx(matthews_corrcoef(labels, found))


@pytest.mark.parametrize("value", [0, 1])
def test_constant_class_predictions(value):
    found = np.full(10, value)
    assert metrics.compute("matthews_correlation", found, LABELS) == 0.0
    assert metrics.compute("accuracy", found, LABELS) == pytest.approx((value == LABELS).mean())
    assert metrics.compute("f1", found, LABELS) == pytest.approx(0.75 if value else 0.0)


@pytest.mark.parametrize("found", [np.full(5, 2.5), [1, np.nan, 2, 3, 4], [1, np.inf, 2, 3, 4]])
def test_constant_values_and_those_of_a_model_that_diverged_have_no_correlation(found):
    targets = np.arange(5.0)
    assert metrics.compute("pearson", np.array(found, dtype=np.float32), targets) == 0.0
    assert metrics.compute("pearson", targets, np.full(5, 2.5)) == 0.0


def test_values_are_plain_floats_for_json():
    targets = np.arange(10, dtype=np.float32)
    assert type(metrics.compute("pearson", targets + 1, targets)) is float
    for name in ("accuracy", "matthews_correlation", "f1"):
        assert type(metrics.compute(name, FOUND, LABELS)) is float


@pytest.mark.parametrize(
    ("name", "found", "text"),
    [
        ("spearman", FOUND, r"metric='spearman'; allowed: accuracy, matthews_correlation, pearson, f1\."),
        ("accuracy", FOUND[:9], r"predictions \(9,\) and labels \(10,\) differ in shape\."),
        ("accuracy", FOUND[:, None], "differ in shape"),  # numpy would broadcast it
    ],
)
def test_wrong_input(name, found, text):
    with pytest.raises(ValueError, match=text):
        metrics.compute(name, found, LABELS)
