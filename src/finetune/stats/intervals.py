"""Intervals over seeds, and what a comparison with a printed number may claim.

A score is one value per (task, seed), in percent. With `x` our `n` runs of a task and `m`, `s`, `n_p` the paper's mean,
standard deviation and number of runs:

    mean over seeds             x̄ ± t(n - 1) sd(x) / √n                         (Student; nothing at n = 1)
    mean over tasks             percentile bootstrap, runs resampled within each task   (rliable)
    ours - paper, over T tasks  (avg x̄ - m) ± t(ν) √(Σ v),   v = sd² / n / T² for each of the 2 T samples,
                                ν = (Σ v)² / Σ (v² / (n - 1))                    (Welch; the usual form at T = 1)

The paper prints numpy's population standard deviation, so `s √(n_p / (n_p - 1))` stands for it above.
"""

import math
from collections.abc import Sequence
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
    """Ours minus the paper's, in points, with its Welch interval.

    Attributes:
        value: The difference.
        low: Lower end of the interval; `None` where a sample has one run or the paper prints no deviation.
        high: Upper end, likewise.
        df: Welch-Satterthwaite degrees of freedom, `None` without an interval.
    """

    value: float
    low: float | None = None
    high: float | None = None
    df: float | None = None


def mean_interval(values: Sequence[float], confidence: float = verdicts.CONFIDENCE) -> Estimate:
    """Mean of the runs of one cell with Student's t interval.

    Args:
        values: One value per seed; finite.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The estimate. A single run has no interval: its spread is unknown, which is not the same as none.

    Raises:
        ValueError: If there is no value, or one is not finite.
    """
    array = _finite(values)
    mean, n = float(array.mean()), len(array)
    if n == 1:
        return Estimate(mean, None, None, n)
    half = _quantile(confidence, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def stratified_bootstrap(
    scores, *, seed: int, samples: int = 10_000, confidence: float = verdicts.CONFIDENCE
) -> Estimate:
    """Average over tasks with the percentile interval of a stratified bootstrap (rliable, arXiv 2108.13264).

    Runs are drawn with replacement within each task; tasks are fixed, not a sample. With few runs per task the
    percentile interval is somewhat too narrow (by √((n - 1) / n) and more), so verdicts use `difference_from_paper`.

    Args:
        scores: Matrix (runs, tasks); NaN where a task lacks a run.
        seed: Seed of the local generator.
        samples: Number of resamples.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The mean of the tasks' means. No interval if a task has a single run.

    Raises:
        ValueError: If the matrix is not 2-D or empty, holds an infinity, or has a task without a run.
    """
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"scores has shape {matrix.shape}; pass a matrix (runs, tasks) with at least one entry")
    tasks = [column[~np.isnan(column)] for column in matrix.T]
    tasks = [_finite(task) for task in tasks]
    counts = [len(task) for task in tasks]
    mean = float(np.mean([task.mean() for task in tasks]))
    if min(counts) == 1:
        return Estimate(mean, None, None, 1)
    tail = _tail(confidence)
    generator = np.random.default_rng(seed)
    draws = [task[generator.integers(0, len(task), (samples, len(task)))].mean(axis=1) for task in tasks]
    low, high = np.quantile(np.mean(draws, axis=0), [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), min(counts))


def difference_from_paper(
    runs: Sequence[Sequence[float]],
    paper_mean: float,
    paper_stds: Sequence[float | None],
    paper_n: int,
    confidence: float = verdicts.CONFIDENCE,
) -> Difference:
    """Ours minus a printed mean with Welch's interval; over several tasks, of their averages.

    Args:
        runs: One sequence of scores per task: a single one for the cell of a task, eight for `AVG`.
        paper_mean: The printed value.
        paper_stds: The printed population standard deviation of each task, `None` where none is printed.
        paper_n: The paper's number of runs per task.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The difference; without an interval if a sample has one run or a deviation is not printed.

    Raises:
        ValueError: If there is no task, the lengths differ, a score is not finite or a deviation is negative.
    """
    if not runs or len(runs) != len(paper_stds):
        raise ValueError(f"got {len(runs)} tasks and {len(paper_stds)} printed deviations; pass one for each task")
    tasks = [_finite(task) for task in runs]
    value = float(np.mean([task.mean() for task in tasks])) - paper_mean
    if min(len(task) for task in tasks) < 2 or paper_n < 2 or any(std is None for std in paper_stds):
        return Difference(value)
    samples = [(float(task.var(ddof=1)), len(task)) for task in tasks]
    samples += [(sample_std(std, paper_n) ** 2, paper_n) for std in paper_stds]
    parts = [(variance / n / len(tasks) ** 2, n - 1) for variance, n in samples]
    total = sum(part for part, _ in parts)
    if total == 0:
        return Difference(value, value, value, math.inf)
    df = total**2 / sum(part**2 / freedom for part, freedom in parts)
    half = _quantile(confidence, df) * math.sqrt(total)
    return Difference(value, value - half, value + half, df)


def sample_std(population_std: float, n: int) -> float:
    """Turn a population standard deviation of `n >= 2` runs (numpy's default) into the sample's, with n - 1."""
    if n < 2 or not population_std >= 0:
        raise ValueError(f"population_std={population_std}, n={n}; a deviation >= 0 of at least 2 runs is needed")
    return population_std * math.sqrt(n / (n - 1))


def verdict(
    difference: Difference | None, *, ran: bool = True, comparable: bool = True, rounding: float, margin: float = 1.0
) -> str:
    """Say what a score claims about the printed one.

    The rule, first match:

    1. `not run`: there is no value of ours.
    2. `not comparable`: the model that ran is not the paper's, the protocol, scale or metric is another, or the paper
       prints no value (`comparable=False`, or no difference).
    3. `inconclusive`: there is no interval (one run, or no printed deviation).
    4. `differs`: the interval of (ours - paper) excludes 0 and |ours - paper| exceeds the rounding of the print.
    5. `agrees`: the interval lies within ±`margin`.
    6. `inconclusive`: anything else.

    Args:
        difference: Ours minus the paper's, in points.
        ran: Whether there is a value of ours.
        comparable: Whether the two may be compared at all.
        rounding: Half a unit of the last printed digit, in points.
        margin: Largest difference that counts as agreement, in points.

    Returns:
        One of `verdicts.VERDICTS`.
    """
    if not ran:
        return verdicts.NOT_RUN
    if not comparable or difference is None:
        return verdicts.NOT_COMPARABLE
    if difference.low is None or difference.high is None:
        return verdicts.INCONCLUSIVE
    if (difference.low > 0 or difference.high < 0) and abs(difference.value) > rounding:
        return verdicts.DIFFERS
    return verdicts.AGREES if -margin <= difference.low and difference.high <= margin else verdicts.INCONCLUSIVE


def within_factor(ours: float, paper: float, factor: float = 2.0) -> bool:
    """Whether two positive values lie within `factor` of each other, the bound included."""
    if not (ours > 0 and paper > 0 and factor >= 1):
        raise ValueError(f"ours={ours}, paper={paper}, factor={factor}; positive values and a factor >= 1 are needed")
    return max(ours, paper) <= factor * min(ours, paper) * (1 + 1e-12)


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"got runs {values!r}; at least one finite value in one dimension is needed")
    return array


def _tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}; it must lie between 0 and 1, such as 0.95")
    return (1 - confidence) / 2


def _quantile(confidence: float, df: float) -> float:
    return float(stats.t.ppf(1 - _tail(confidence), df))
