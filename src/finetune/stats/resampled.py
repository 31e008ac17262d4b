"""Scores of several runs on resampled examples, all resamples at once.

A resample draws as many of the `N` examples as there are, with replacement: example `i` counts `w_i` times. A metric of
that is one of sums weighted by `w`, so all resamples and runs are a product of matrices:

    accuracy                Σ w [p = y] / N
    Matthews correlation    of the contingency table Σ w [p = a] [y = b]; 0 where it is not defined
    Pearson correlation     of the moments Σ w p, Σ w p², Σ w y, Σ w y², Σ w p y; 0 where it is not defined
    loss                    Σ w l / Σ w c, of examples with summed loss `l` over `c` predictions

The metrics are those of `finetune.training.metrics`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_CELLS = 4_000_000
"""Counts that are held at once: resamples times examples."""


@dataclass(frozen=True)
class Resampled:
    """Scores of runs of one task, in the metric's own unit.

    Attributes:
        scores: `(runs,)`, on the examples as they are.
        replicates: `(samples, runs)`, on resampled examples, which all runs share.
    """

    scores: np.ndarray
    replicates: np.ndarray

    def of(self, runs: Sequence[int]) -> "Resampled":
        """Some of the runs, by place."""
        return Resampled(self.scores[[*runs]], self.replicates[:, [*runs]])


def resample_scores(
    metric: str, predictions: np.ndarray, labels: np.ndarray, *, seed: int | Sequence[int], samples: int
) -> Resampled:
    """Compute a metric of every run on the same resampled examples.

    Args:
        metric: One of `METRICS`.
        predictions: `(runs, examples)`: classes or values; for `loss` the summed loss of each example.
        labels: `(examples,)`; for `loss` the number of predictions in each example.
        seed: Seed of the local generator.
        samples: Number of resamples.

    Raises:
        ValueError: If the metric is unknown, or the shapes do not fit.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}; allowed: {', '.join(METRICS)}")
    if predictions.ndim != 2 or not predictions.size or labels.shape != predictions.shape[1:]:
        raise ValueError(f"predictions {predictions.shape}, labels {labels.shape}; needed: (runs, n) and (n,), n > 0")
    found = METRICS[metric]
    blocks = [found(counts, predictions, labels) for counts in _counts(labels.size, seed, samples)]
    return Resampled(found(np.ones((1, labels.size)), predictions, labels)[0], np.concatenate(blocks))


def _counts(examples: int, seed: int | Sequence[int], samples: int) -> Iterator[np.ndarray]:
    """How often each example was drawn: `(resamples, examples)`, block by block."""
    rng = np.random.default_rng(seed)
    block = max(1, _CELLS // examples)
    for start in range(0, samples, block):
        rows = min(block, samples - start)
        drawn = rng.integers(0, examples, (rows, examples)) + examples * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * examples).reshape(rows, examples).astype(np.float64)


def _accuracy(counts: np.ndarray, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return counts @ (predictions == labels).T / labels.size


def _matthews(counts: np.ndarray, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of any number of classes (Gorodkin 2004), as scikit-learn's."""
    right, both = counts @ (predictions == labels).T, np.zeros((len(counts), len(predictions)))
    squared, true = np.zeros_like(both), np.zeros((len(counts), 1))
    for one in np.union1d(predictions, labels):
        predicted, actual = counts @ (predictions == one).T, counts @ (labels[None] == one).T
        both, squared, true = both + predicted * actual, squared + predicted**2, true + actual**2
    total = labels.size
    return _ratio(right * total - both, (total**2 - squared) * (total**2 - true))


def _pearson(counts: np.ndarray, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    x = np.where(np.all(np.isfinite(predictions), axis=1, keepdims=True), predictions, 0.0).astype(np.float64)
    x, y = x - x.mean(axis=1, keepdims=True), labels - labels.mean(dtype=np.float64)
    shares = counts / labels.size
    mean_x, mean_y = shares @ x.T, (shares @ y)[:, None]
    square_x, square_y = shares @ (x**2).T, (shares @ y**2)[:, None]
    spread_x, spread_y = square_x - mean_x**2, square_y - mean_y**2
    # A resample of one value alone has no spread but rounding.
    spread_x, spread_y = (np.where(s > 1e-12 * q, s, 0.0) for s, q in ((spread_x, square_x), (spread_y, square_y)))
    return _ratio(shares @ (x * y).T - mean_x * mean_y, spread_x * spread_y)


def _loss(counts: np.ndarray, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return counts @ predictions.T.astype(np.float64) / (counts @ labels.astype(np.float64))[:, None]


def _ratio(covariance: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """A correlation; 0 where a variance is."""
    defined = variances > 0
    return np.where(defined, covariance / np.sqrt(np.where(defined, variances, 1.0)), 0.0)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "accuracy": _accuracy,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "loss": _loss,
}
"""Name -> function of counts `(resamples, examples)`, predictions and labels, which gives `(resamples, runs)`."""
