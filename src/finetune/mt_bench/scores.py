"""Scores from judgments of single answers, as FastChat's `show_result` defines them.

An item is one turn of one question. With `s(q, t)` the score of an item:

    a model's score     mean of s(q, t) over all its items, both turns together; failed ones (-1) left out
    per turn            the same over the items of that turn
    per category        the same over the items of that category's questions, both turns

An item judged several times counts once, with the median of its repeats. What was left out is never silent:
`finetune.mt_bench.judged` counts what is missing, and a `Score` carries how many items it is made of.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.mt_bench.rating import LEAST, MOST

Line = Mapping[str, Any]
"""A judgment: FastChat's `question_id`, `model`, `judge` (name, prompt), `turn`, `score`; ours adds `repeat`."""

Item = tuple[int, int]
"""(question id, turn)."""

FAILED = -1
"""FastChat's score of a judgment without a rating."""

TURNS = (1, 2)


@dataclass(frozen=True)
class Score:
    """A model's score.

    Attributes:
        average: Mean over all items, 1 to 10; `None` without an item.
        turns: Turn -> mean over its items; a turn without an item is not in it.
        categories: Category -> mean over its items, both turns; empty if no categories were given.
        items: Number of items behind `average`.
    """

    average: float | None
    turns: Mapping[int, float]
    categories: Mapping[str, float]
    items: int


def item_scores(lines: Iterable[Line]) -> dict[Item, float]:
    """Reduce the judgments of one model by one judge to one score an item, the median of its repeats.

    Args:
        lines: Judgments; without `repeat` a line is repeat 0. Failed ones (-1) are left out.

    Returns:
        Item -> score, ascending. An item all of whose repeats failed is not in it.

    Raises:
        ValueError: If a line is no judgment, models or judges are mixed, or a repeat of an item occurs twice.
    """
    found: dict[Item, dict[int, float]] = {}
    for line in _checked(lines):
        item, repeat = (line["question_id"], line["turn"]), line.get("repeat", 0)
        if repeat in found.setdefault(item, {}):
            raise ValueError(
                f"question {item[0]}, turn {item[1]}, repeat {repeat} of {line['model']} was judged twice; one "
                "judgment each is allowed: leave the older one out"
            )
        found[item][repeat] = line["score"]
    kept = {item: [score for score in repeats.values() if score != FAILED] for item, repeats in sorted(found.items())}
    return {item: float(statistics.median(scores)) for item, scores in kept.items() if scores}


def summarize(items: Mapping[Item, float], categories: Mapping[int, str] | None = None) -> Score:
    """Score a model from its items.

    Args:
        items: Item -> score (`item_scores`).
        categories: Question id -> category (`categories_of`); `None` leaves the categories out.

    Raises:
        ValueError: If a question has no category.
    """
    by_category: dict[str, list[float]] = {}
    if categories is not None:
        for (question, _), score in items.items():
            if question not in categories:
                raise ValueError(
                    f"question {question} was judged and has no category; pass the question file it is from"
                )
            by_category.setdefault(categories[question], []).append(score)
    by_turn = {turn: [score for (_, other), score in items.items() if other == turn] for turn in TURNS}
    return Score(
        average=statistics.fmean(items.values()) if items else None,
        turns={turn: statistics.fmean(scores) for turn, scores in by_turn.items() if scores},
        categories={category: statistics.fmean(scores) for category, scores in by_category.items()},
        items=len(items),
    )


def categories_of(questions: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Question id -> category, from FastChat's question lines."""
    return {question["question_id"]: question["category"] for question in questions}


def is_score(value: Any) -> bool:
    """Whether a value is a rating, a number from 1 to 10, or -1."""
    return type(value) in (int, float) and (value == FAILED or LEAST <= value <= MOST)


def _checked(lines: Iterable[Line]) -> list[Line]:
    """Check fields and values, and that all lines are of one judge and one model."""
    lines = list(lines)
    for number, line in enumerate(lines, 1):
        missing = {"question_id", "model", "judge", "turn", "score"} - set(line)
        if missing or line["turn"] not in TURNS or not is_score(line["score"]):
            raise ValueError(
                f"judgment {number} is {dict(line)!r:.200}; needed are question_id, model, judge, turn (1 or 2) and "
                f"score (1 to 10, or -1){f': it lacks {sorted(missing)}' if missing else ''}"
            )
    for name, values in (("model", {line["model"] for line in lines}), ("judge", {line["judge"][0] for line in lines})):
        if len(values) > 1:
            raise ValueError(f"judgments of several {name}s are mixed: {', '.join(sorted(values))}; pass those of one")
    return lines
