"""Whether two methods' judged scores differ by more than the questions' choice and the judge's own noise.

Questions are the sample, answers to one question are paired, seeds are averaged first: with `w` the multinomial weights
of a resample of the questions (within each category, if asked) and `S(q)`, `N(q)` the sum and number of a question's
judged items,

    score of a seed     Σ w(q) S(q) / Σ w(q) N(q)           averaged over seeds; its 2.5 and 97.5 % quantiles
    difference          the same with S(q) the sum of (first - second) over the items that every seed of both has
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.mt_bench.scores import FAILED, Item, Line, item_scores
from finetune.stats.intervals import Estimate
from finetune.stats.verdicts import CONFIDENCE

SEPARATED = "separated"
INSIDE_NOISE = "inside the judge's noise"

PUBLISHED_NOISE = 0.2
"""Change of a model's mean score between two passes of a GPT-4 judge over the same answers: 0.16 to 0.2 points
(FastChat issues 3018 and 2969). It stands in where nothing was judged twice."""


@dataclass(frozen=True)
class Comparison:
    """Difference of two methods' scores, first minus second.

    Attributes:
        difference: In points.
        low, high: Ends of the interval; `None` with fewer than two questions.
        questions, items: How many there are behind it.
        unpaired: Number of items that at least one seed of either lacks, left out of the difference.
    """

    difference: float
    low: float | None
    high: float | None
    questions: int
    items: int
    unpaired: int


def repeat_noise(lines: Iterable[Line]) -> float | None:
    """How far a model's score moves when the same answers are judged again.

    Args:
        lines: Judgments of one model by one judge; without `repeat` a line is repeat 0.

    Returns:
        Largest minus smallest of the repeats' mean scores, over the items that every repeat has; `None` if nothing was
        judged twice.

    Raises:
        ValueError: As `item_scores`.
    """
    by_repeat: dict[int, list[Line]] = {}
    for line in lines:
        if line.get("score") != FAILED:
            by_repeat.setdefault(line.get("repeat", 0), []).append(line)
    scores = [item_scores(found) for _, found in sorted(by_repeat.items())]
    common = set.intersection(*(set(found) for found in scores)) if scores else set()
    if len(scores) < 2 or not common:
        return None
    means = [statistics.fmean(found[item] for item in common) for found in scores]
    return max(means) - min(means)


def bootstrap_score(
    seeds: Sequence[Mapping[Item, float]],
    *,
    seed: int,
    categories: Mapping[int, str] | None = None,
    samples: int = 10_000,
) -> Estimate:
    """Mean over seeds of the FastChat score, with a percentile interval over questions.

    Args:
        seeds: One mapping item -> score for each seed of the method.
        seed: Of the local generator.
        categories: Question id -> category: resample within each; `None` resamples all questions together.

    Returns:
        The estimate, `n` the number of judged items of all seeds. No interval with fewer than two questions.

    Raises:
        ValueError: If a seed has no item, or a question no category.
    """
    if not seeds or not all(seeds):
        raise ValueError(f"got seeds with {[len(found) for found in seeds]} judged items; each needs at least one")
    questions = sorted({question for found in seeds for question, _ in found})
    sums, counts = (np.stack(tables) for tables in zip(*(_by_question(f, questions) for f in seeds), strict=True))
    mean = float(np.mean(sums.sum(axis=1) / counts.sum(axis=1)))
    return Estimate(mean, *_interval(sums, counts, questions, categories, seed, samples), int(counts.sum()))


def paired_bootstrap(
    first: Sequence[Mapping[Item, float]],
    second: Sequence[Mapping[Item, float]],
    *,
    seed: int,
    categories: Mapping[int, str] | None = None,
    samples: int = 10_000,
) -> Comparison:
    """Difference of two methods over the items that both have, with a percentile interval over questions.

    Args:
        first, second: One mapping item -> score for each seed of a method; seeds are averaged item by item.
        seed, categories: As in `bootstrap_score`.

    Raises:
        ValueError: If there is no seed, no item in common, or a question without a category.
    """
    if not first or not second:
        raise ValueError(f"got {len(first)} and {len(second)} seeds; each method needs at least one")
    everything = [*first, *second]
    common = set.intersection(*(set(found) for found in everything))
    union = set().union(*everything)
    if not common:
        raise ValueError(f"no item was judged in every one of {len(everything)} seeds: nothing to pair")
    pairs = {
        item: statistics.fmean(found[item] for found in first) - statistics.fmean(found[item] for found in second)
        for item in sorted(common)
    }
    questions = sorted({question for question, _ in pairs})
    sums, counts = _by_question(pairs, questions)
    ends = _interval(sums[None], counts[None], questions, categories, seed, samples)
    return Comparison(float(sums.sum() / counts.sum()), *ends, len(questions), len(common), len(union) - len(common))


def comparison_verdict(comparison: Comparison, noise: float) -> str:
    """Say whether two methods are apart: the interval excludes 0, and the difference is no smaller than the noise.

    Args:
        comparison: The difference; without an interval nothing is apart.
        noise: Largest `repeat_noise` among the judged answers of both methods, or `PUBLISHED_NOISE` where nothing was
            judged twice; in points, at least 0.

    Raises:
        ValueError: If the noise is negative or not a number.
    """
    if not noise >= 0:
        raise ValueError(f"noise={noise}; a spread of scores is at least 0")
    low, high = comparison.low, comparison.high
    includes_0 = low is None or high is None or low <= 0 <= high
    return INSIDE_NOISE if includes_0 or abs(comparison.difference) < noise else SEPARATED


def _by_question(items: Mapping[Item, float], questions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of each question's items, both of shape (questions,)."""
    place = {question: index for index, question in enumerate(questions)}
    index = [place[question] for question, _ in items]
    size = len(questions)
    return np.bincount(index, [*items.values()], size), np.bincount(index, minlength=size).astype(np.float64)


def _interval(
    sums: np.ndarray,
    counts: np.ndarray,
    questions: Sequence[int],
    categories: Mapping[int, str] | None,
    seed: int,
    samples: int,
) -> tuple[float, float] | tuple[None, None]:
    """Percentile interval of the mean score over seeds; sums and counts have the shape (seeds, questions)."""
    if categories is not None and (unknown := [q for q in questions if q not in categories]):
        raise ValueError(f"questions {unknown} have no category; pass the question file that they are from")
    names = np.array([categories[question] if categories is not None else "" for question in questions])
    groups = [np.flatnonzero(names == name) for name in dict.fromkeys(names)]
    if all(len(group) < 2 for group in groups):
        return None, None
    generator, weights = np.random.default_rng(seed), np.empty((samples, len(questions)))
    for group in groups:
        weights[:, group] = generator.multinomial(len(group), np.full(len(group), 1 / len(group)), samples)
    # A resample may miss all questions that a seed has answers to: that seed is not in its mean then.
    with np.errstate(invalid="ignore"):
        draws = np.nanmean((weights @ sums.T) / (weights @ counts.T), axis=1)
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
