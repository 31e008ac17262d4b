"""The least difference of two methods that so many seeds and examples find: before the runs, and of the runs.

The difference of two means over `n` seeds on `N` examples has the variance

    2 (1 - ρ_s) σ² / n   +   2 (1 - ρ_x) v / N

with the seeds' standard deviation σ, the variance `v` that one example adds to a score, and the correlations of the two
methods over seeds (ρ_s) and examples (ρ_x). `v` follows from the score: `a (1 - a)` of an accuracy (binomial), `1 - m²`
of a Matthews correlation (balanced classes, where it is `2 a - 1`), `(1 - r²)²` of Pearson's (normal values).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import optimize, stats

from finetune.stats import verdicts

POWER = 0.8
"""Probability that a difference of the least detectable size is found."""

EXAMPLE_VARIANCE: dict[str, Callable[[float], float]] = {
    "accuracy": lambda score: score * (1 - score),
    "matthews_correlation": lambda score: 1 - score**2,
    "pearson": lambda score: (1 - score**2) ** 2,
}
"""Metric -> variance that one example adds, from the score as a fraction."""


@dataclass(frozen=True)
class Part:
    """A part of the variance of an estimate, with the degrees of freedom that it is known with."""

    variance: float
    df: float


def planned_parts(
    *, spread: float, seeds: int, variance: float, examples: int, seed_correlation: float, example_correlation: float
) -> tuple[Part, float]:
    """The variance of a difference that is not there yet, by seeds and by examples.

    Args:
        spread: Standard deviation over seeds of one method's score.
        seeds: Number of seeds, the same of both methods.
        variance: That one example adds to one method's score (`EXAMPLE_VARIANCE`), in the square of the spread's unit.
        examples: Number of examples that are scored.
        seed_correlation: Of the two methods' scores over seeds; 0: pairing by seed gains nothing.
        example_correlation: Of what an example adds to both scores.

    Raises:
        ValueError: If a count is below 1 or a number out of range.
    """
    if seeds < 1 or examples < 1 or spread < 0 or variance < 0:
        raise ValueError(f"{seeds} seeds, {examples} examples, spread {spread}, variance {variance}; all above 0")
    if not all(-1 <= one <= 1 for one in (seed_correlation, example_correlation)):
        raise ValueError(f"correlations {seed_correlation} and {example_correlation}; allowed: -1 to 1")
    over_seeds = 2 * (1 - seed_correlation) * spread**2 / seeds
    return Part(over_seeds, seeds - 1), 2 * (1 - example_correlation) * variance / examples


def pooled(parts: Sequence[Part]) -> Part:
    """The sum of independent parts, with Satterthwaite's degrees of freedom; 0 if one part has none."""
    total = sum(part.variance for part in parts)
    if any(part.df < 1 for part in parts):
        return Part(total, 0)
    if total == 0:
        return Part(0.0, math.inf)
    return Part(total, total**2 / sum(part.variance**2 / part.df for part in parts))


def least_detectable(seeds: Sequence[Part], examples: float, *, power: float = POWER) -> float | None:
    """The least difference that a two-sided test at the level of `verdicts` finds with this power.

    The root of the squared differences that the seeds' t test and the examples' normal test find alone. Against the
    test of `finetune.stats.multibootstrap` that was right to 2 % on one task, and up to 10 % too small over several.

    Args:
        seeds: Variance by seeds, a part for each task or sample.
        examples: Variance by examples.
        power: Between the level and 1.

    Returns:
        In the root of the variances' unit; `None` where a part has no degree of freedom, as of one seed.

    Raises:
        ValueError: If the power is out of range.
    """
    if not verdicts.LEVEL < power < 1:
        raise ValueError(f"power={power}; allowed: between {verdicts.LEVEL} and 1")
    both = pooled(seeds)
    if both.df < 1:
        return None
    normal = math.sqrt(examples) * float(stats.norm.ppf(1 - verdicts.LEVEL / 2) + stats.norm.ppf(power))
    if both.variance == 0:
        return normal
    critical = float(stats.t.ppf(1 - verdicts.LEVEL / 2, both.df))

    def lacking(shift: float) -> float:
        return float(stats.nct.sf(critical, both.df, shift)) - power

    shift = optimize.root_scalar(lacking, bracket=(0.0, 10 * critical + 10)).root
    return math.hypot(normal, math.sqrt(both.variance) * shift)
