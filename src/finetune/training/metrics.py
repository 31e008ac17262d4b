"""GLUE's metrics of predictions and labels, ``(n,)`` arrays each, by the choices of the released code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from finetune.store.checks import LOWER_IS_BETTER


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal entries."""
    return float((predictions == labels).mean())


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation, in [-1, 1]; 0 for constant predictions."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation, in [-1, 1]; 0 where it is not defined: constant predictions, a model that has diverged."""
    from scipy.stats import pearsonr

    if not np.isfinite(predictions).all() or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(pearsonr(predictions, labels).statistic)


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1; reported beside accuracy on MRPC and QQP, never in its place."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "f1": f1,
}


def improves(name: str, score: float, best: float | None) -> bool:
    """Whether a score beats the best one so far (None: there is none)."""
    if best is None:
        return True
    return score < best if name in LOWER_IS_BETTER else score > best


def compute(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """A metric by name.

    Raises:
        ValueError: on an unknown name or unequal lengths.
    """
    if name not in METRICS:
        raise ValueError(f"metric={name!r}; allowed: {', '.join(METRICS)}.")
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} differ in shape.")
    return METRICS[name](predictions, labels)
