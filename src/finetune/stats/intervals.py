"""Intervals over seeds, and what a comparison with a printed number may claim.

A score is one value per (task, seed), in percent. With `x` our `n` runs of a task and `m`, `s`, `n_p` the paper's mean,
standard deviation and number of runs:

    mean over T tasks           x̄ ± t(ν) √(Σ v),   v = sd(x)² / n / T²,   ν = (Σ v)² / Σ (v² / (n - 1))
                                (Satterthwaite; Student's at T = 1; nothing where n = 1)
    the same by resampling      percentile bootstrap, runs drawn anew within each task   (rliable, arXiv 2108.13264)
    ours - paper                (x̄ - m) ± t(ν) √(Σ v) over the 2 T samples    (Welch; the usual form at T = 1)

The paper prints numpy's population standard deviation, so `s √(n_p / (n_p - 1))` stands for it above.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from finetune.stats import verdicts


@dataclass(frozen=True)
class Estimate:
    """A mean over runs with its interval.

    Attributes:
        mean: The mean, in the unit of the values.
        low: Lower end of the interval; `None` where one run gives no spread.
        high: Upper end, likewise.
        n: Number of runs (for an average over tasks: the least number of runs of a task).
    """

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """A difference in points (ours minus the paper's, or of two methods) with its t interval.

    Attributes:
        value: The difference.
        low: Lower end of the interval; `None` where a sample has one run or the paper prints no deviation.
        high: Upper end, likewise.
        df: Satterthwaite's degrees of freedom, `None` without an interval.
        p: Two-sided p-value of the t test that it is 0, likewise.
    """

    value: float
    low: float | None = None
    high: float | None = None
    df: float | None = None
    p: float | None = None


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean of the runs of one cell with Student's t interval.

    A single run has no interval: its spread is unknown, which is not the same as none.

    Raises:
        ValueError: If there is no value, or one is not finite.
    """
    found = mean_over_tasks([values])
    return Estimate(found.value, found.low, found.high, len(values))


def mean_over_tasks(tasks: Sequence[Sequence[float]]) -> Difference:
    """Mean of the tasks' means with its t interval; tasks weigh the same and are fixed.

    Args:
        tasks: One sequence over seeds for each task: scores, or paired differences of two methods. Where a task has a
            single value there is no interval.

    Raises:
        ValueError: If there is no task, a task has no value, or a value is not finite.
    """
    arrays = finite(tasks)
    value = float(np.mean([array.mean() for array in arrays]))
    return _with_interval(value, [(_variance(array), len(array)) for array in arrays], len(arrays))


def difference_from_paper(
    runs: Sequence[Sequence[float]], paper_mean: float, paper_stds: Sequence[float | None], paper_n: int
) -> Difference:
    """Ours minus a printed mean with Welch's interval; over several tasks, of their averages.

    Args:
        runs: One sequence of scores per task: a single one for the cell of a task, eight for `AVG`.
        paper_mean: The printed value.
        paper_stds: The printed population standard deviation of each task, `None` where none is printed. Then, or if a
            sample has one run, there is no interval.
        paper_n: The paper's number of runs per task.

    Raises:
        ValueError: If there is no task, the lengths differ, a score is not finite or a deviation is negative.
    """
    if len(runs) != len(paper_stds):
        raise ValueError(f"got {len(runs)} tasks and {len(paper_stds)} printed deviations; pass one for each task")
    arrays = finite(runs)
    value = float(np.mean([array.mean() for array in arrays])) - paper_mean
    if paper_n < 2 or any(std is None for std in paper_stds):
        return Difference(value)
    samples = [(_variance(array), len(array)) for array in arrays]
    samples += [(sample_std(std, paper_n) ** 2, paper_n) for std in paper_stds if std is not None]
    return _with_interval(value, samples, len(arrays))


def sample_std(population_std: float, n: int) -> float:
    """Turn a population standard deviation of `n >= 2` runs (numpy's default) into the sample's, with n - 1."""
    if n < 2 or not population_std >= 0:
        raise ValueError(f"population_std={population_std}, n={n}; a deviation >= 0 of at least 2 runs is needed")
    return population_std * math.sqrt(n / (n - 1))


def bootstrap(tasks: Sequence[Sequence[float]], *, seed: int, iqm: bool = False, samples: int = 10_000) -> Estimate:
    """Mean over tasks, or interquartile mean of all values, with a stratified bootstrap's percentile interval.

    With few runs per task the interval is somewhat too narrow (by √((n - 1) / n) and more), so verdicts use t intervals
    and tests.

    Args:
        tasks: As in `mean_over_tasks`.
        seed: Seed of the local generator.
        iqm: The mean of the middle half of all values in place of the mean of the tasks' means.
        samples: Number of resamples.

    Returns:
        The estimate; no interval where `n` is one.

    Raises:
        ValueError: As `mean_over_tasks`.
    """
    arrays = finite(tasks)
    statistic = _middle_half if iqm else _mean
    least = min(map(len, arrays))
    ends = (None, None) if least < 2 else percentiles(arrays, statistic, seed=seed, samples=samples)
    return Estimate(float(statistic(*arrays, axis=-1)), *ends, least)


def percentiles(
    data: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], *, seed: int, samples: int
) -> tuple[float, float]:
    """Percentile interval of a statistic by scipy's bootstrap, each of several samples drawn anew within itself.

    Args:
        data: The samples, each of at least two values.
        statistic: Called with resampled `data`, each of shape (samples, values), and `axis=-1`.
        seed: Seed of the local generator.
        samples: Number of resamples.
    """
    options = {"n_resamples": samples, "confidence_level": verdicts.CONFIDENCE, "method": "percentile"}
    found = stats.bootstrap(data, statistic, vectorized=True, rng=np.random.default_rng(seed), **options)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def finite(tasks: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """Check the values of each task and return them as arrays.

    Raises:
        ValueError: If there is no task, a task has no value, or a value is not finite.
    """
    arrays = [np.asarray(task, dtype=np.float64) for task in tasks]
    if not arrays or any(array.ndim != 1 or not array.size or not np.isfinite(array).all() for array in arrays):
        raise ValueError(f"got runs {tasks!r}; at least one task is needed, each with at least one finite value")
    return arrays


def verdict(difference: Difference, *, rounding: float, margin: float = 1.0) -> str:
    """Say what a score that may be compared claims about the printed one.

    The rule, first match:

    1. `inconclusive`: there is no interval (one run, or no printed deviation).
    2. `differs`: the interval of (ours - paper) excludes 0 and |ours - paper| exceeds the rounding of the print.
    3. `agrees`: the interval lies within ±`margin`.
    4. `inconclusive`: anything else.

    Args:
        difference: Ours minus the paper's, in points.
        rounding: Half a unit of the last printed digit, in points.
        margin: Largest difference that counts as agreement, in points.
    """
    if difference.low is None or difference.high is None:
        return verdicts.INCONCLUSIVE
    if (difference.low > 0 or difference.high < 0) and abs(difference.value) > rounding:
        return verdicts.DIFFERS
    return verdicts.AGREES if -margin <= difference.low and difference.high <= margin else verdicts.INCONCLUSIVE


def _with_interval(value: float, samples: Sequence[tuple[float, int]], tasks: int) -> Difference:
    """The t interval of a mean over tasks from (variance, runs) of every sample behind it."""
    if min(n for _, n in samples) < 2:
        return Difference(value)
    parts = [(variance / n / tasks**2, n - 1) for variance, n in samples]
    total = sum(part for part, _ in parts)
    if total == 0:
        return Difference(value, value, value, math.inf, float(value == 0))
    df = total**2 / sum(part**2 / freedom for part, freedom in parts)
    error = math.sqrt(total)
    half = error * float(stats.t.ppf((1 + verdicts.CONFIDENCE) / 2, df))
    return Difference(value, value - half, value + half, df, 2 * float(stats.t.sf(abs(value) / error, df)))


def _variance(array: np.ndarray) -> float:
    return float(array.var(ddof=1)) if len(array) > 1 else math.nan


def _mean(*tasks: np.ndarray, axis: int) -> np.ndarray:
    return np.mean([task.mean(axis=axis) for task in tasks], axis=0)


def _middle_half(*tasks: np.ndarray, axis: int) -> np.ndarray:
    return stats.trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)
