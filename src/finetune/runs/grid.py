"""A search that samples nothing, without Optuna: the points of a grid in turn, its extensions, the same median pruning.

It asks what :func:`finetune.runs.search.run_search` asks, and its summary is the same. What a kill left is in a file of
lines: reports, and trials that ended.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.runs.search_space import LOSS, SearchSpace, beyond
from finetune.store.files import write_atomically
from finetune.store.lines import append_line, cut, whole_lines
from finetune.training.loop import Ended, NonFiniteLoss

log = logging.getLogger(__name__)


class Pruned(Ended):
    """A trial that is worse than the median of those before it."""


@dataclass
class _Grid:
    """Trials that ended, by number, and what they and the one that runs reported, by step."""

    path: Path
    trials: list[dict[str, Any]] = field(default_factory=list)
    reported: dict[int, dict[int, float]] = field(default_factory=dict)

    def note(self, entry: Mapping[str, Any]) -> None:
        append_line(self.path, _line(entry))
        self.take(entry)

    def take(self, entry: Mapping[str, Any]) -> None:
        if "step" in entry:
            self.reported.setdefault(entry["number"], {})[entry["step"]] = entry["value"]
        else:
            self.trials.append(dict(entry))

    def complete(self) -> list[dict[str, Any]]:
        return [trial for trial in self.trials if trial["state"] == "complete"]

    def best(self) -> dict[str, Any] | None:
        return max(self.complete(), key=lambda t: (t["value"], -(t[LOSS] or 0.0), -t["number"]), default=None)

    def rates(self) -> list[float]:
        return sorted({trial["learning_rate"] for trial in self.trials})


def run_grid(objective: Callable[..., Any], space: SearchSpace, path: Path, digest: str) -> dict[str, Any]:
    """Run what is missing of a grid.

    Args:
        objective: as of :func:`finetune.runs.search.run_search`.
        space: what to search; its points are all its trials.
        path: file of what is done.
        digest: of the search; the file of another one begins anew.

    Returns:
        As :func:`finetune.runs.search.summary`.

    Raises:
        ValueError: if there are fewer points than trials, or none completed.
    """
    if not is_grid(space):
        raise ValueError(
            f"{space.trials} trials of {len(space.points)} points: the others are sampled, which needs optuna."
        )
    grid = _open(path, digest)
    while (number := len(grid.trials)) < space.trials or _next_point(grid, space):
        point = space.points[number] if number < space.trials else _next_point(grid, space)
        assert point is not None
        grid.note({"number": number, **_tried(grid, space, number, point, objective)})
    best = grid.best()
    if best is None:
        raise ValueError(f"no trial of {number} completed (pruned or diverged): lower search.learning_rate.")
    extended, rates = len(grid.trials) - space.trials, grid.rates()
    point = {name: best[name] for name in ("learning_rate", "batch_size", "value")}
    shown = [
        {**t, "intermediate": {str(s): v for s, v in grid.reported.get(t["number"], {}).items()}} for t in grid.trials
    ]
    return {
        "best": point | {"trial": best["number"]},
        "best_is_at_edge": len(rates) > 1 and best["learning_rate"] in (rates[0], rates[-1]),
        "trials": shown,
        "n_trials": space.trials + extended,
    } | ({"extended": extended} if space.extend else {})


def is_grid(space: SearchSpace) -> bool:
    """Whether a search samples nothing: each of its trials is a point."""
    return space.trials <= len({json.dumps(dict(point), sort_keys=True) for point in space.points})


def _open(path: Path, digest: str) -> _Grid:
    grid, lines = _Grid(path), whole_lines(path)
    if lines[:1] != [header := _line({"search": digest})]:
        write_atomically(path, header)
        return grid
    sound = list(itertools.takewhile(lambda line: line.startswith(_sum(line[17:])), lines))
    cut(path, sound)
    for line in sound[1:]:
        grid.take(json.loads(line[17:]))
    return grid


def _line(entry: Mapping[str, Any]) -> bytes:
    """An entry behind the beginning of its sha256: a changed byte is found, and from there on all is done again."""
    text = json.dumps(entry).encode() + b"\n"
    return _sum(text) + text


def _sum(text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()[:16]} ".encode()


def _next_point(grid: _Grid, space: SearchSpace) -> dict[str, Any] | None:
    """The next extension, or None where the search is at its end."""
    best = grid.best()
    if best is None or len(grid.trials) - space.trials >= space.extend:
        return None
    return beyond(best, grid.rates(), space)


def _tried(
    grid: _Grid, space: SearchSpace, number: int, point: Mapping[str, Any], objective: Callable[..., Any]
) -> dict[str, Any]:
    """Try a point; what came of it."""
    started, own = time.time(), grid.reported.setdefault(number, {})

    def report(step: int, score: float) -> None:
        if step not in own:
            grid.note({"number": number, "step": step, "value": score})
        if _is_hopeless(grid, space, own):
            raise Pruned

    state, value, loss = "complete", None, None
    try:
        found = objective(dict(point), report)
        value, loss = found if isinstance(found, tuple) else (found, None)
    except Pruned:
        state = "pruned"
    except NonFiniteLoss as error:
        state = "diverged"
        log.info("trial %d %s: %s", number, point, error)
    log.info("trial %d %s: %s", number, point, state if value is None else f"{value:.4f}")
    return {"state": state, "value": value, LOSS: loss, **point, "seconds": time.time() - started}


def _is_hopeless(grid: _Grid, space: SearchSpace, own: Mapping[int, float]) -> bool:
    """Whether the best report of a trial is below the median of the complete ones' at its step (Optuna's rule)."""
    complete, step = grid.complete(), max(own)
    if len(complete) < max(1, space.startup_trials) or step < space.warmup_steps:
        return False
    others = [grid.reported[t["number"]][step] for t in complete if step in grid.reported.get(t["number"], {})]
    return bool(others) and max(own.values()) < statistics.median(others)
