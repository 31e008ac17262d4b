"""Two methods on the same tasks and seeds: a sign-flip test, Holm's correction, the probability of improvement.

With `d(t, s) = x(t, s) - y(t, s)` over the `n(t)` seeds that both methods have of each of `T` tasks:

    difference      d̄ = Σ_t mean_s d(t, s) / T      its intervals: `intervals.mean_over_tasks`, `intervals.bootstrap`
    sign flips      p = share of the 2^N sign patterns of all N pairs with |d̄ flipped| >= |d̄|
    P(x > y)        mean over tasks of the share of (run of x, run of y) with x > y, ties one half

Sign flips ask nothing of the scores' distribution but that under "no difference" a pair's two runs could have been
swapped; three to five seeds are too few for asymptotic tests, and a rank test would throw the sizes away. Pairing by
seed is valid even where seeds share nothing; it then merely gains no power. P(x > y) is rliable's (arXiv 2108.13264).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from finetune.stats.intervals import Estimate, finite, percentiles

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
    """

    p: float
    least: float


def sign_flip_test(tasks: Sequence[Sequence[float]], *, seed: int, samples: int = 100_000) -> SignFlips:
    """Test whether a mean paired difference over tasks is 0.

    Args:
        tasks: One sequence of paired differences over seeds for each task, in points.
        seed: Seed of the local generator, used beyond `EXACT_PAIRS` pairs.
        samples: Number of patterns drawn there; the observed one counts as one more, so that p is never 0.

    Raises:
        ValueError: If there is no task, a task has no pair, or a difference is not finite.
    """
    arrays = finite(tasks)
    weighted = np.concatenate([array / len(array) / len(arrays) for array in arrays])
    patterns = 2 ** len(weighted)
    if patterns == 2:
        return SignFlips(1.0, 1.0)
    exact = patterns <= max(samples, 2**EXACT_PAIRS)
    options = {"n_resamples": np.inf if exact else samples, "batch": 10_000, "rng": np.random.default_rng(seed)}
    found = stats.permutation_test((weighted,), _sum, permutation_type="samples", vectorized=True, **options)
    return SignFlips(float(found.pvalue), 2 / patterns if exact else 2 / (samples + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979), in the order given."""
    p, n = np.asarray(p_values, dtype=np.float64), len(p_values)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(n)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate((n - np.arange(n)) * p[order]))
    return corrected.tolist()


def probability_of_improvement(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], *, seed: int, samples: int = 10_000
) -> Estimate:
    """Probability that a run of the first method scores above one of the second on a task drawn at random (rliable).

    Args:
        first: One sequence of scores for each task.
        second: Likewise, the same tasks in the same order.
        seed: Seed of the local generator; runs of both methods are drawn independently, as in rliable.
        samples: Number of resamples.

    Returns:
        The estimate; no interval where `n` is one.

    Raises:
        ValueError: If the numbers of tasks differ, or as `sign_flip_test`.
    """
    if len(first) != len(second):
        raise ValueError(f"got {len(first)} and {len(second)} tasks; pass the same tasks of both methods")
    runs = [array for pair in zip(finite(first), finite(second), strict=True) for array in pair]
    least = min(map(len, runs))
    ends = (None, None) if least < 2 else percentiles(runs, _share_above, seed=seed, samples=samples)
    return Estimate(float(_share_above(*runs, axis=-1)), *ends, least)


def _sum(values: np.ndarray, axis: int) -> np.ndarray:
    # Sums of the same numbers in another order differ by rounding, and a tie must count as one.
    return np.round(values.sum(axis=axis), 9)


def _share_above(*runs: np.ndarray, axis: int) -> np.ndarray:
    """Mean over tasks of the share of pairs with x above y, ties one half; `runs` is x, y of each task in turn."""
    signs = [np.sign(x[..., :, None] - y[..., None, :]) for x, y in zip(runs[::2], runs[1::2], strict=True)]
    return np.mean([(sign.mean(axis=(axis - 1, axis)) + 1) / 2 for sign in signs], axis=0)
