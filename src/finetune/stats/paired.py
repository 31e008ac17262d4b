"""Two methods on the same tasks and seeds: differences, their intervals, a permutation test, and rliable's measures.

With `d(t, s) = x(t, s) - y(t, s)` over the `n(t)` seeds that both methods have of each of `T` tasks:

    difference      d̄ = Σ_t mean_s d(t, s) / T      tasks weigh the same, seeds are paired within a task
    t interval      d̄ ± t(ν) √(Σ_t v(t)),   v(t) = sd(t)² / n(t) / T²,   ν = (Σ v)² / Σ (v² / (n - 1))
    sign flips      p = share of the 2^N sign patterns of all N pairs with |d̄ flipped| >= |d̄|
    IQM             mean of the middle half of all d(t, s)
    P(x > y)        mean over tasks of the share of (run of x, run of y) with x > y, ties one half

Sign flips ask nothing of the scores' distribution but that under "no difference" a pair's two runs could have been
swapped; three to five seeds are too few for asymptotic tests, and a rank test would throw the sizes away. Pairing by
seed is valid even where seeds share nothing; it then merely gains no power. The last two measures are those of rliable
(arXiv 2108.13264), with its stratified bootstrap: seeds are drawn within each task, tasks are fixed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as distributions

from finetune.stats.intervals import Difference, Estimate

EXACT_PAIRS = 16
"""Up to so many pairs all sign patterns are tried, 65,536 of them; beyond, they are drawn."""

LEAST_FOR_IQM = 8
"""Values that an interquartile mean needs: below, the middle half is four or fewer values."""


@dataclass(frozen=True)
class SignFlips:
    """A sign-flip permutation test of a mean paired difference, two-sided.

    Attributes:
        p: Its p-value.
        least: The smallest p-value that so many pairs allow.
        exact: Whether all patterns were tried.
    """

    p: float
    least: float
    exact: bool


def paired_difference(tasks: Sequence[Sequence[float]], confidence: float = 0.95) -> Difference:
    """Mean over tasks of the mean paired difference, with its t interval.

    Args:
        tasks: One sequence of differences over seeds for each task, in points.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The difference; no interval where a task has a single pair.

    Raises:
        ValueError: If there is no task, a task has no pair, or a difference is not finite.
    """
    arrays = _tasks(tasks)
    value = float(np.mean([array.mean() for array in arrays]))
    if min(map(len, arrays)) < 2:
        return Difference(value)
    parts = [(float(array.var(ddof=1)) / len(array) / len(arrays) ** 2, len(array) - 1) for array in arrays]
    total = sum(part for part, _ in parts)
    if total == 0:
        return Difference(value, value, value, math.inf)
    df = total**2 / sum(part**2 / freedom for part, freedom in parts)
    half = float(distributions.t.ppf((1 + confidence) / 2, df)) * math.sqrt(total)
    return Difference(value, value - half, value + half, df)


def sign_flip_test(tasks: Sequence[Sequence[float]], *, seed: int, samples: int = 100_000) -> SignFlips:
    """Test whether a mean paired difference over tasks is 0.

    Args:
        tasks: As in `paired_difference`.
        seed: Seed of the local generator, used beyond `EXACT_PAIRS` pairs.
        samples: Number of patterns drawn there; the observed one counts as one more, so that p is never 0.

    Raises:
        ValueError: As `paired_difference`.
    """
    arrays = _tasks(tasks)
    weighted = np.concatenate([array / len(array) / len(arrays) for array in arrays])
    n = len(weighted)
    exact = n <= EXACT_PAIRS
    if exact:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    else:
        bits = np.random.default_rng(seed).integers(0, 2, (samples, n), dtype=np.int8)
    flipped = (2.0 * bits - 1) @ weighted
    # Sums of the same numbers in another order differ by rounding: a tie must count as one.
    observed = abs(float(weighted.sum()))
    extreme = int(np.count_nonzero(np.abs(flipped) >= observed - 1e-9 * max(observed, 1.0)))
    p = extreme / 2**n if exact else (extreme + 1) / (samples + 1)
    return SignFlips(p, 2.0 ** (1 - n) if exact else 1 / (samples + 1), exact)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(order), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def interquartile_mean(values) -> np.ndarray:
    """Mean of the middle half along the last axis: a quarter, rounded down, is cut at either end."""
    array = np.sort(np.asarray(values, dtype=np.float64), axis=-1)
    cut = array.shape[-1] // 4
    return array[..., cut : array.shape[-1] - cut].mean(axis=-1)


def bootstrap(
    tasks: Sequence[Sequence[float]], *, seed: int, iqm: bool = False, samples: int = 10_000, confidence: float = 0.95
) -> Estimate:
    """Mean over tasks, or interquartile mean of all values, with a stratified bootstrap's percentile interval.

    Args:
        tasks: One sequence over seeds for each task: scores of a method, or paired differences.
        seed: Seed of the local generator.
        iqm: The interquartile mean of all values in place of the mean of the tasks' means.
        samples: Number of resamples.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The estimate, `n` the least number of values of a task; no interval where that is one. With few seeds the
        percentile interval is somewhat too narrow.

    Raises:
        ValueError: As `paired_difference`.
    """
    arrays = _tasks(tasks)
    value = interquartile_mean(np.concatenate(arrays)) if iqm else np.mean([array.mean() for array in arrays])
    least = min(map(len, arrays))
    if least < 2:
        return Estimate(float(value), None, None, least)
    generator = np.random.default_rng(seed)
    draws = [array[generator.integers(0, len(array), (samples, len(array)))] for array in arrays]
    found = interquartile_mean(np.concatenate(draws, axis=1)) if iqm else np.mean([d.mean(axis=1) for d in draws], 0)
    return Estimate(float(value), *_percentiles(found, confidence), least)


def probability_of_improvement(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    *,
    seed: int,
    samples: int = 10_000,
    confidence: float = 0.95,
) -> Estimate:
    """Probability that a run of the first method scores above one of the second on a task drawn at random (rliable).

    Args:
        first: One sequence of scores for each task.
        second: Likewise, the same tasks in the same order.
        seed, samples, confidence: As in `bootstrap`; runs of both methods are drawn independently, as in rliable.

    Raises:
        ValueError: If the numbers of tasks differ, or as `paired_difference`.
    """
    if len(first) != len(second):
        raise ValueError(f"got {len(first)} and {len(second)} tasks; pass the same tasks of both methods")
    ones, others = _tasks(first), _tasks(second)
    value = float(np.mean([_share_above(x[None], y[None])[0] for x, y in zip(ones, others, strict=True)]))
    least = min(map(len, (*ones, *others)))
    if least < 2:
        return Estimate(value, None, None, least)
    generator = np.random.default_rng(seed)
    shares = [
        _share_above(*(a[generator.integers(0, len(a), (samples, len(a)))] for a in pair))
        for pair in zip(ones, others, strict=True)
    ]
    return Estimate(value, *_percentiles(np.mean(shares, axis=0), confidence), least)


def _share_above(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of pairs with x above y, ties one half; (samples, n) and (samples, m) to (samples,)."""
    return ((np.sign(x[:, :, None] - y[:, None, :]) + 1) / 2).mean(axis=(1, 2))


def _percentiles(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _tasks(tasks: Sequence[Sequence[float]]) -> list[np.ndarray]:
    arrays = [np.asarray(task, dtype=np.float64) for task in tasks]
    if not arrays or any(array.ndim != 1 or not array.size or not np.isfinite(array).all() for array in arrays):
        raise ValueError(f"got tasks {tasks!r}; at least one is needed, each with at least one finite value")
    return arrays
