"""A plan for a reader: tables of text, from the template beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from finetune.plan.throughput import CALCULATED, MEASURED, SCALED, UNKNOWN
from finetune.stats.detectable import POWER
from finetune.stats.verdicts import LEVEL

MARKS = {MEASURED: "", SCALED: "~", CALCULATED: "*", UNKNOWN: "?"}
COMPONENTS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer_state": "state",
    "bases": "bases",
    "activations": "activations",
    "selection": "selection",
    "folding": "folding",
    "snapshot": "snapshot",
}


def plan_text(plan: Mapping[str, Any], unplanned: Sequence[str]) -> str:
    """The whole plan.

    `unplanned` are stages of the pipeline whose time is not estimated.
    """
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"aligned": _aligned, "gigabytes": _gigabytes, "fixed": format}
    environment.filters |= {"marked": _marked, "number": _number, "time": _time}
    cards, first = plan["cards"], {row["method"]: row["components"] for row in plan["memory"]}
    prices = [card["price"] for card in cards.values()]
    return environment.from_string(resources.files("finetune.plan").joinpath("plan.txt.j2").read_text()).render(
        plan=plan,
        unplanned=unplanned,
        components=COMPONENTS,
        power=POWER,
        level=LEVEL,
        cards=list(cards),
        limited=[name for name, card in cards.items() if card["memory"] is not None],
        totals=list(plan["totals"].values()),
        prices=prices,
        priced=any(price is not None for price in prices),
        lazy=[name for name, parts in first.items() if parts["optimizer_state"] != parts["optimizer_state_first"]],
        rates={name: {s for row in plan["stages"] for s in row["cards"][name]["sources"]} for name in cards},
    )


def _aligned(text: str, left: int) -> str:
    """Lines of cells between bars as columns; the first ones to the left, the others to the right."""
    rows = [[cell.strip() for cell in line.split("|")] for line in text.strip("\n").splitlines()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    padded = ([side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)] for row in rows)
    return "".join("  ".join(row).rstrip() + "\n" for row in padded)


def _marked(card: Mapping[str, Any]) -> str:
    """The seconds of a stage on a card, with the mark of the least certain rate in them."""
    mark = MARKS[max(card["kinds"], key=list(MARKS).index, default=MEASURED)]
    return mark + ("" if card["seconds"] is None else _time(card["seconds"]))


def _time(seconds: float | None) -> str:
    """Seconds, minutes or hours, with the unit."""
    if seconds is None:
        return "-"
    unit, name = next(((u, n) for u, n in ((3600, "h"), (60, "min")) if seconds >= u), (1, "s"))
    return f"{_number(seconds / unit)} {name}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _gigabytes(size: float | jinja2.Undefined | None) -> str:
    return f"{size / 1e9:.2f}" if isinstance(size, int | float) else ""
