"""The statistics on the page, as grids over the fields of `statistics.json`; statistics.md has all of them in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from finetune.report.labels import Labels
from finetune.report.markdown import interval as spaced
from finetune.report.markdown import p_value
from finetune.report.page.blocks import Block, Grid, Heading, Paragraph
from finetune.report.statistics.families import METHODS
from finetune.stats import verdicts


class Unit(NamedTuple):
    """Of differences."""

    name: str
    places: int


POINTS, NATS = Unit("points", 2), Unit("nats", 3)
"""Of scores and of losses."""


def statistics_blocks(content: Mapping[str, Any], labels: Labels) -> Iterator[Block]:
    """All comparisons of `statistics.json`, our runs first."""
    yield Paragraph(
        "Differences are at equal task and seed, intervals at 95 %, p corrected by Holm over a family: sign flips for "
        f"scores, the paired t test for losses. Least p is what so many pairs allow at all: above {verdicts.LEVEL} no "
        "data could separate two methods. statistics.json holds the bootstraps, the interquartile means and the tests "
        "of the printed cells too.",
        "lead",
    )
    groups = (("runs", "Our runs", POINTS), ("decoders", "Our losses", NATS), ("logs", "The authors’ logs", POINTS))
    for group, whose, unit in groups:
        for place, entry in enumerate(content[group], 1):
            yield Heading(f"statistics-{group}-{place}", f"{whose}: {entry['title']}")
            yield from _comparison(entry, unit, labels)


def pair_name(pair: Mapping[str, Any], labels: Labels) -> str:
    """The two methods of a difference."""
    return f"{labels.method(pair['first'])} − {labels.method(pair['second'])}"


def said(verdict: str, pair: Mapping[str, Any], labels: Labels) -> str:
    """A verdict on a pair with the better one's name."""
    better = {verdicts.FIRST_BETTER: "first", verdicts.SECOND_BETTER: "second"}.get(verdict)
    return f"{labels.method(pair[better])} is better" if better else verdict


def family_title(family: Mapping[str, Any], labels: Labels) -> str:
    """Name of a family for readers, such as "variants of SparseGrad"."""
    return f"{family['kind']} {labels.method(family['of'])}" if family["of"] else family["kind"]


def ends(counts: Iterable[int]) -> str:
    """The least and the largest count, such as "3 to 5"; one number where they are the same."""
    found = [*counts]
    return " to ".join(map(str, sorted({min(found), max(found)})))


def interval(estimate: Mapping[str, Any] | None, sign: str = "", places: int = 2) -> str:
    """An estimate with its interval, which no line break cuts."""
    return spaced(estimate, sign, places).replace(", ", ",\N{NO-BREAK SPACE}")


def _comparison(entry: Mapping[str, Any], unit: Unit, labels: Labels) -> Iterator[Grid]:
    """The means of an entry's methods, then its differences."""
    methods, printed, places = entry["comparison"]["methods"], entry.get("printed", {}), unit.places
    tasks = labels.in_order({task for found in methods.values() for task in found["tasks"]})
    several, rows = len(tasks) > 1, []
    for name, found in methods.items():
        counts = [one["n"] for one in found["tasks"].values()]
        over = "" if len(counts) == len(tasks) else f" (over {len(counts)} of {len(tasks)} tasks)"
        means = [interval(found["mean"], places=places) + over] if several else []
        means += [f"{printed[name]['printed_same_tasks']:.2f}"] if name in printed else []
        cells = [interval(found["tasks"].get(task), places=places) for task in tasks]
        rows.append([labels.method(name), *means, *cells, ends(counts)])
    head = ["method", *(["AVG"] if several else []), *(["printed, same tasks"] if printed else [])]
    caption = f"Means, {'in percent' if unit == POINTS else 'nats a token, lower is better'}"
    yield Grid(caption, [*head, *map(labels.task, tasks), "seeds"], rows)
    for family in entry["comparison"]["families"]:
        yield from _family(family, unit, labels)


def _family(family: Mapping[str, Any], unit: Unit, labels: Labels) -> Iterator[Grid]:
    """The differences of the means, and of single tasks where there are several."""
    title = family_title(family, labels)
    tasks = labels.in_order({task for pair in family["pairs"] for task in pair["tasks"]})
    rows, single = [], []
    for pair in family["pairs"]:
        name, test = pair_name(pair, labels), pair["mean"]
        difference, pairs = interval(test["difference"], "+", unit.places), str(test["pairs"])
        pairs += f", {pair['unpaired']} runs without partner" if pair["unpaired"] else ""
        ps = [p_value(test[key]) for key in ("p", "p_holm", "least")]
        rows.append([name, said(test["verdict"], pair, labels), difference, interval(pair["improvement"]), pairs, *ps])
        cells = {
            task: f"{interval(one['difference'], '+', unit.places)}, p {p_value(one['p_holm'])}"
            for task, one in pair["tasks"].items()
        }
        single.append([name, *(cells.get(task, "–") for task in tasks)])
    head = ["pair", "verdict", "difference", "P(first > second)", "pairs", "p", "p (Holm)", "least p"]
    yield Grid(f"Differences, {unit.name}: {title}", head, rows)
    if family["kind"] == METHODS and len(tasks) > 1:
        yield Grid(f"Single tasks, p by Holm: {title}", ["pair", *map(labels.task, tasks)], single)
