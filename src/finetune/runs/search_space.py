"""What a search tries, and whether it is at its end. Needs no Optuna: what was searched elsewhere is understood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.runs.choices import for_method

LOSS = "validation_loss"
"""Of a trial: what breaks ties."""


@dataclass(frozen=True)
class SearchSpace:
    """What is searched, and how long.

    Attributes:
        learning_rate: bounds, sampled log-uniformly.
        batch_sizes: allowed values.
        trials: in all, extensions left out; complete, pruned and diverged ones count.
        points: tried first, in this order; each has ``learning_rate`` and ``batch_size``.
        extend: how often at most, after all trials, a learning rate beyond those tried follows, while the best lies at
            their edge.
        startup_trials, warmup_steps: of the median pruner.
        seed: base of the sampler's seeds.
    """

    learning_rate: tuple[float, float]
    batch_sizes: tuple[int, ...]
    trials: int
    points: tuple[Mapping[str, Any], ...] = ()
    extend: int = 0
    startup_trials: int = 5
    warmup_steps: int = 0
    seed: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> SearchSpace:
        """What the protocol searches, and how long the scale says.

        Raises:
            ValueError: if the scale has points for some methods, and none for this one or its base.
        """
        bounds, sizes = config["protocol"]["search"], config["scale"]["search"]
        points = for_method(sizes["points"], config["method"], "scale.search.points")
        if not all(isinstance(point, Mapping) for point in points):
            batch = for_method(config["scale"]["batch_size"], config["method"], "scale.batch_size")
            points = [p if isinstance(p, Mapping) else {"learning_rate": p, "batch_size": batch} for p in points]
        return cls(
            learning_rate=tuple(bounds["learning_rate"]),
            batch_sizes=tuple(bounds["batch_sizes"]),
            trials=sizes["trials"],
            points=tuple(points),
            extend=sizes.get("extend", 0),
            startup_trials=sizes["pruning"]["startup_trials"],
            warmup_steps=sizes["pruning"]["warmup_steps"],
            seed=config["protocol"]["search_seed"],
        )


def is_whole(record: Mapping[str, Any], space: SearchSpace) -> bool:
    """Whether a record has all trials of a search, and all extensions."""
    extended, rates = record.get("extended", 0), sorted({trial["learning_rate"] for trial in record["trials"]})
    if extended > space.extend or record["n_trials"] != space.trials + extended:
        return False
    return extended == space.extend or beyond(record["best"], rates, space) is None


def beyond(best: Mapping[str, Any], rates: Sequence[float], space: SearchSpace) -> dict[str, Any] | None:
    """The best point with the next learning rate in the ratio of the outer two; None inside, or out of bounds."""
    if len(rates) < 2 or best["learning_rate"] not in (rates[0], rates[-1]):
        return None
    last, before = rates[:2] if best["learning_rate"] == rates[0] else rates[:-3:-1]
    rate = float(f"{last * last / before:.6g}")  # 3e-4 after 1e-4, not 3.0000000000000003e-4
    (low, high) = space.learning_rate
    return {"learning_rate": rate, "batch_size": best["batch_size"]} if low <= rate <= high else None
