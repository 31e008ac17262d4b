"""Two methods on the same examples, by resampling seeds and examples together; and whether they are equal.

The multi-bootstrap (arXiv 2106.16163) of the difference of two methods' mean scores over seeds. A resample draws seeds
and examples with replacement. Both methods get the same examples, and where seeds are paired the same seeds:

    d*  =  Σ_s u_s d_s(w) / n        d_s(w): difference at seed s on the resampled examples w; u: counts of seeds

Its percentile interval is too narrow at three to eight seeds that differ much: it covered 76 to 91 % in simulations, in
place of 95 (`tests/finetune/stats/test_multibootstrap.py` has one). So tests and verdicts take the seeds' part from
Student's t, the examples' part from the same resamples:

    d†  =  Σ_s d_s(w) / n  +  t(ν) √V        V = sd(d)² / n,  ν = n - 1

which covered 93 to 98 %. Over tasks, and of unpaired seeds, `V` is the sum of the parts and `ν` Satterthwaite's.
p-values and the two one-sided tests of equivalence (Schuirmann 1987) are shares of the `d†` beyond 0 and a margin.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from finetune.stats import verdicts
from finetune.stats.detectable import Part, least_detectable, pooled
from finetune.stats.resampled import Resampled


@dataclass(frozen=True)
class Draws:
    """A difference of two methods, and what resampling makes of it.

    Attributes:
        value: First minus second.
        resampled: `(samples,)`, `d*` above. Of one seed: the examples' part alone.
        examples: `(samples,)`, the first term of `d†`.
        parts: Variance of the value by seeds, with degrees of freedom: 0 where a method has one seed, whose spread is
            not known.
        seeds: The least number of seeds behind it.
    """

    value: float
    resampled: np.ndarray
    examples: np.ndarray
    parts: tuple[Part, ...]
    seeds: int

    def drawn(self) -> np.ndarray | None:
        """`(samples,)`, `d†` above; `None` with one seed."""
        if self.seeds < 2:
            return None
        # Evenly spaced quantiles have exact tails; the examples' draws beside them are in no order.
        spread, samples = pooled(self.parts), self.examples.size
        grid = (np.arange(samples) + 0.5) / samples
        return self.examples + math.sqrt(spread.variance) * stats.t.ppf(grid, spread.df)

    def beyond(self, bound: float, side: int) -> float:
        """Share of `d†` beyond a bound, below it (`side` -1) or above it (1).

        Each resample of the examples gives the whole tail of t, so that many corrected p-values have no floor of one
        resample. Without a spread of seeds resamples are counted, the observed one as one more.
        """
        spread, away = pooled(self.parts), side * (self.examples - bound)
        if spread.variance == 0:
            return (1 + int((away >= 0).sum())) / (1 + away.size)
        return float(special.stdtr(spread.df, away / math.sqrt(spread.variance)).mean())


@dataclass(frozen=True)
class Equivalence:
    """What is said of two methods.

    Attributes:
        value: First minus second.
        low: Lower end of the interval of `d†`; `None` with one seed.
        high: Upper end, likewise.
        bootstrap: Percentile interval of the multi-bootstrap; with one seed, of the examples alone.
        p: Two-sided p-value that the difference is 0; `None` with one seed.
        p_equal: Larger p-value of the two one-sided tests that it is beyond the margin; `None` without a margin too.
        detectable: Least difference that so many seeds and examples find with 80 % power; `None` with one seed.
    """

    value: float
    low: float | None
    high: float | None
    bootstrap: tuple[float, float]
    p: float | None
    p_equal: float | None
    detectable: float | None
    seeds: int


def difference(first: Resampled, second: Resampled, *, paired: bool, seed: int | Sequence[int]) -> Draws:
    """Resample the difference of two methods on one task.

    Args:
        first: Runs of the first method; of one `resample_scores` call with the second's, so that examples are shared.
        second: Likewise.
        paired: Whether run `i` of both is of the same seed.
        seed: Seed of the local generator: the same one draws the same seeds for every pair.

    Raises:
        ValueError: If runs are paired, but not of the same number.
    """
    if paired:
        if first.scores.size != second.scores.size:
            raise ValueError(f"{first.scores.size} and {second.scores.size} runs; paired are as many of both")
        one = Resampled(first.scores - second.scores, first.replicates - second.replicates)
        signed = [(1.0, one)]
    else:
        signed = [(1.0, first), (-1.0, second)]
    rng, samples = np.random.default_rng(seed), len(first.replicates)
    resampled, examples, parts = np.zeros(samples), np.zeros(samples), []
    for sign, one in signed:
        n = one.scores.size
        counts = rng.multinomial(n, [1 / n] * n, samples)
        resampled += sign * (counts * one.replicates).mean(axis=1)
        examples += sign * one.replicates.mean(axis=1)
        parts.append(Part(float(one.scores.var(ddof=1)) / n if n > 1 else math.nan, n - 1))
    value = float(sum(sign * one.scores.mean() for sign, one in signed))
    return Draws(value, resampled, examples, tuple(parts), min(one.scores.size for _, one in signed))


def average(tasks: Sequence[Draws]) -> Draws:
    """The mean of the differences of several tasks, which are fixed and weigh the same; each drew for itself."""
    return Draws(
        float(np.mean([one.value for one in tasks])),
        np.mean([one.resampled for one in tasks], axis=0),
        np.mean([one.examples for one in tasks], axis=0),
        tuple(Part(part.variance / len(tasks) ** 2, part.df) for one in tasks for part in one.parts),
        min(one.seeds for one in tasks),
    )


def equivalence(draws: Draws, margin: float | None) -> Equivalence:
    """Test whether a difference is 0, and whether it is within a margin.

    Args:
        draws: Of the difference.
        margin: Largest difference that does not matter, stated before the runs, in the difference's unit; `None`:
            there is none.

    Raises:
        ValueError: If the margin is not above 0.
    """
    if margin is not None and not margin > 0:
        raise ValueError(f"margin={margin}; a number above 0 is needed")
    bootstrap, drawn = _percentiles(draws.resampled), draws.drawn()
    if drawn is None:
        return Equivalence(draws.value, None, None, bootstrap, None, None, None, draws.seeds)
    p = min(1.0, 2 * min(draws.beyond(0.0, -1), draws.beyond(0.0, 1)))
    p_equal = None if margin is None else max(draws.beyond(-margin, -1), draws.beyond(margin, 1))
    least = least_detectable(draws.parts, float(draws.examples.var()))
    return Equivalence(draws.value, *_percentiles(drawn), bootstrap, p, p_equal, least, draws.seeds)


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    outside = 50 * (1 - verdicts.CONFIDENCE)
    low, high = np.percentile(draws, [outside, 100 - outside])
    return float(low), float(high)
