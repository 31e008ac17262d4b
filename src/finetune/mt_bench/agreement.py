"""How far a judge agrees with another one on the same answers, and the records that say it.

An item is one turn of one question, answered by one model. With `x` the reference's rating of an item and `y` the
judge's, the median of its repeats:

    spearman, pearson   correlation of x and y over all items of all models
    kappa               Cohen's, weighted by the square of the distance, of ratings to the nearest half point
    difference          mean of y - x, in points
    unrated             share of the judge's answers, repeats counted, that have no rating; none is asked for again
    noise               the largest spread of a model's mean over repeats (`comparison.repeat_noise`)
    position            rank and mean of each model by both judges, over the items that both rated
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.mt_bench.comparison import repeat_noise
from finetune.mt_bench.rating import LEAST, MOST
from finetune.mt_bench.scores import Item, Line, item_scores
from finetune.store import records

KIND = "agreement"
RECORD = "agreement.json"
JUDGES = "judges"
"""Folder of `results` with a folder for each judge."""

SETTINGS = ("name", "model", "temperature", "max_tokens", "parsing")
"""Of a record's `judge`: what makes it the same judge. Where it is, and how often it is asked, does not."""


def measure(
    reference: Mapping[str, Mapping[Item, float]], judged: Mapping[str, Sequence[Line]], expected: int
) -> dict[str, Any]:
    """Hold a judge's ratings against the reference's.

    Args:
        reference: Model -> item -> rating.
        judged: Model -> the judge's judgments that have a rating, repeats included.
        expected: Judgments that were asked for.

    Returns:
        `items`, `spearman`, `pearson`, `kappa`, `difference`, `unrated`, `noise`, and `models`: name -> `items`,
        `reference` and `judge`, each with `mean` and `rank`. What can't be had is `None`: a correlation or kappa where
        a judge gives every item the same, the noise where nothing was judged twice, all but `unrated` without an item.
    """
    ours = {model: item_scores(lines) for model, lines in judged.items()}
    pairs = {
        model: [(theirs[item], found[item]) for item in found if item in theirs]
        for model, found in ours.items()
        for theirs in [reference[model]]
    }
    x, y = np.array([pair for found in pairs.values() for pair in found], dtype=np.float64).reshape(-1, 2).T
    spreads = [spread for lines in judged.values() if (spread := repeat_noise(lines)) is not None]
    return {
        "items": len(x),
        **_correlations(x, y),
        "difference": float(np.mean(y - x)) if len(x) else None,
        "unrated": 1 - sum(map(len, judged.values())) / expected,
        "noise": max(spreads, default=None),
        "models": _positions({model: found for model, found in pairs.items() if found}),
    }


def _correlations(x: np.ndarray, y: np.ndarray) -> dict[str, float | None]:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import cohen_kappa_score

    if min(len({*x}), len({*y})) < 2:
        return {"spearman": None, "pearson": None, "kappa": None}
    spearman: Any = spearmanr(x, y)
    pearson: Any = pearsonr(x, y)
    halves = [np.round(2 * ratings).astype(int) for ratings in (x, y)]
    labels = range(2 * LEAST, 2 * MOST + 1)
    return {
        "spearman": float(spearman.statistic),
        "pearson": float(pearson.statistic),
        "kappa": float(cohen_kappa_score(*halves, labels=[*labels], weights="quadratic")),
    }


def _positions(pairs: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Mean and rank of each model by both judges; models of the same mean share the better rank."""
    from scipy.stats import rankdata

    if not pairs:
        return {}
    means = np.array([np.mean(found, axis=0) for found in pairs.values()])
    ranks = rankdata(-means, method="min", axis=0)
    return {
        model: {
            "items": len(found),
            **{
                judge: {"mean": float(mean), "rank": int(rank)}
                for judge, mean, rank in zip(("reference", "judge"), means[row], ranks[row], strict=True)
            },
        }
        for row, (model, found) in enumerate(pairs.items())
    }


def read_agreements(results: str | Path) -> list[dict[str, Any]]:
    """Read the records of all judges: `<results>/judges/<name>/agreement.json`.

    Raises:
        ValueError: If one is damaged, or not what was written.
    """
    return [records.read_record(path) for path in sorted((Path(results) / JUDGES).glob(f"*/{RECORD}"))]


def agreement_of(judge: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record of a judge among those that are known; `None` if there is none of its `SETTINGS`.

    Args:
        judge: As in a record of judgments.
        known: Records of agreement.
    """
    wanted = [judge.get(name) for name in SETTINGS]
    return next((one for one in known if [one["judge"][name] for name in SETTINGS] == wanted), None)


def in_words(record: Mapping[str, Any]) -> str:
    """All figures of a record in one sentence."""
    found, reference = record["agreement"], record["reference"]["judge"]
    numbers = [
        f"{name} {_shown(found[key])}"
        for name, key in (("Spearman", "spearman"), ("Pearson", "pearson"), ("quadratic weighted kappa", "kappa"))
    ]
    places = [
        f"{model} {one['judge']['rank']} ({one['judge']['mean']:.2f}; {reference}: {one['reference']['rank']}, "
        f"{one['reference']['mean']:.2f})"
        for model, one in found["models"].items()
    ]
    return (
        f"agreement with {reference} on {found['items']} items: {', '.join(numbers)}, mean difference "
        f"{_shown(found['difference'], '+.2f')} points, {100 * found['unrated']:.1f} % without a rating, noise over "
        f"repeats {_shown(found['noise'])}; place and mean of each model: {', '.join(places) or 'none'}"
    )


def _shown(value: float | None, form: str = ".3f") -> str:
    return "not defined" if value is None else format(value, form)
