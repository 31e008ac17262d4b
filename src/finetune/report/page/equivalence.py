"""What is better, worse or equal by predictions, on the page: the questions, and how the runs went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.report.labels import Labels
from finetune.report.markdown import p_value
from finetune.report.page.blocks import Block, Grid, Heading, Paragraph
from finetune.report.page.scores import NATS, POINTS, Unit, interval, pair_name


def equivalence_blocks(content: Mapping[str, Any], labels: Labels) -> Iterator[Block]:
    """The part `equivalence` of `statistics.json`; nothing where no record holds predictions."""
    if "equivalence" not in content:
        return
    settings = content["equivalence"]["settings"]
    for place, entry in enumerate(content["equivalence"]["models"], 1):
        unit = NATS if entry["losses"] else POINTS
        yield Heading(f"statistics-equivalence-{place}", f"Better, worse or equal: {entry['title']}")
        margin = settings["margin"]["loss" if entry["losses"] else "score"]
        said = "the spread of the control’s seeds" if margin == "control" else f"{margin:g} {unit.name}"
        rows = ", ".join(f"{labels.task(task)} {count}" for task, count in entry["rows"].items())
        yield Paragraph(
            f"Seeds and validation rows ({rows}) resampled together, by the predictions in the records. Equal: within "
            f"the margin stated before the runs, {said}. Least found: the difference that so many seeds and rows find "
            f"with {100 * settings['power']:g} % power. One seed has no known spread and decides nothing."
        )
        yield from _questions(entry, unit, labels)
        yield _courses(entry, unit, labels, settings["patience"])


def _questions(entry: Mapping[str, Any], unit: Unit, labels: Labels) -> Iterator[Grid]:
    tasks = [*entry["rows"]] if len(entry["rows"]) > 1 else []
    rows = []
    for question in entry["questions"]:
        for place, pair in enumerate(question["pairs"]):
            whole, test = pair["mean"], pair["mean"]["test"]
            least = "–" if test["detectable"] is None else f"{test['detectable']:.{unit.places}f}"
            cells = [pair_name(pair, labels), whole["verdict"], interval(test, "+", unit.places), str(test["seeds"])]
            cells += [p_value(whole["p_holm"]), p_value(whole["p_equal_holm"]), least]
            cells += [_of_task(pair["tasks"].get(task), unit) for task in tasks]
            rows.append([question["ask"] if place == 0 else "", *cells])
    if rows:
        head = ["question", "pair", "verdict", "difference", "seeds", "p (Holm)", "p equal (Holm)", "least found"]
        yield Grid(f"Questions, {unit.name}", [*head, *map(labels.task, tasks)], rows)


def _of_task(found: Mapping[str, Any] | None, unit: Unit) -> str:
    return "–" if found is None else f"{interval(found['test'], '+', unit.places)}, {found['verdict']}"


def _courses(entry: Mapping[str, Any], unit: Unit, labels: Labels, patience: int) -> Grid:
    rows: list[Sequence[str]] = []
    for one in entry["courses"]:
        scores = [interval(one[name], places=unit.places) for name in ("best", "last", "stopped")]
        lost = "not known" if one["collapsed"] is None else f"{one['collapsed'] + one['diverged']} of {one['runs']}"
        rows.append([labels.method(one["method"]), labels.task(one["task"]), *scores, lost])
    head = ["method", "task", "best evaluation", "last evaluation", f"stopped early, patience {patience}"]
    return Grid(f"How the runs went, {unit.name}", [*head, "collapsed or diverged"], rows)
