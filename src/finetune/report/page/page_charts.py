"""Scores as dots with intervals, drawn for the page: one small panel a column of a table, one line a row.

The panels are SVG that the page's style colours, so that they read in light and dark, and keep the size of the page's
text at any width. The printed value and the logs' stand beside ours only where the paper's own model ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.report.figures.figure_style import COLOURS
from finetune.report.page.markup import Html, join, tag
from finetune.report.page.page_tables import BuiltTable
from finetune.report.paper.layouts import METHODS, PAPER_MODELS
from finetune.report.tables.writers import format_value

CHARTED = (9, 10, 4, 6)
"""Tables drawn as dots, in the order of the page: scores of tasks, loss and judged score."""

_UNITS = {"Valid Loss": "nats a token, lower is better", "I-Bench Score": "1 to 10"}
"""Column -> unit; scores of tasks and their averages are in percent."""

NO_QUALITY = "no measure of quality"

_WIDTH, _LEFT, _RIGHT, _TOP, _LINE, _BOTTOM = 300, 92, 14, 10, 26, 26

Row = Mapping[str, Any]


def chart_html(table: BuiltTable) -> Html | None:
    """The panels of a table: columns with an interval in at least one row.

    Args:
        table: Any table; only :data:`CHARTED` have columns that dots suit.

    Returns:
        A figure, or None where nothing of the table has run.
    """
    columns = dict.fromkeys(row["column"] for row in table.rows if row["ours_low"] is not None)
    panels = [_panel([row for row in table.rows if row["column"] == column], column) for column in columns]
    if not panels:
        return None
    own = any(_printed(row) is not None for row in table.rows)
    printed = (
        " Diamonds: printed; triangles: the authors' logs."
        if own
        else " Another model than the paper's: its printed values stand in the table alone."
    )
    caption = join(
        [
            tag("b", f"Table {table.number}, {table.title}. "),
            "Dots: ours, mean with its 95 % interval; every panel has its own axis.",
            printed,
            " ",
            *table.lead[:1],
        ]
    )
    return tag(
        "figure",
        "\n",
        tag("div", "\n", *(join([panel, "\n"]) for panel in panels), class_="panels"),
        "\n",
        tag("figcaption", caption),
        "\n",
        class_="chart",
    )


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round values inside an interval, at most `most + 1` of them.

    Args:
        low: Lower end.
        high: Upper end, above it.
        most: Steps that may fit in.
    """
    if not high > low:
        raise ValueError(f"low={low}, high={high}; the upper end must be above the lower one.")
    power = 10.0**-12
    while True:
        for factor in (1, 2, 5):
            step = factor * power
            if (high - low) / step <= most:
                first = -int(-low // step)
                return [step * place for place in range(first, int(high // step) + 1)]
        power *= 10


def _panel(rows: Sequence[Row], column: str) -> Html:
    """One column: a line a row that ran."""
    rows = [row for row in rows if row["ours"] is not None]
    low, high = _range(rows)
    height = _TOP + _LINE * len(rows) + _BOTTOM

    def x(value: float) -> str:
        return f"{_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT):.1f}"

    bottom = height - _BOTTOM + 4
    marks = ticks(low, high)
    digits = max((len(f"{value:.6g}".partition(".")[2]) for value in marks), default=0)
    parts = [
        join(
            [
                tag("line", x1=x(value), x2=x(value), y1=_TOP, y2=bottom, class_="rule"),
                tag("text", f"{value:.{digits}f}", x=x(value), y=height - 6, class_="tick"),
            ]
        )
        for value in marks
    ]
    for place, row in enumerate(rows):
        parts.append(_dot(row, x, _TOP + _LINE * place + _LINE // 2))
    words = "; ".join(_words(row) for row in rows)
    unit = _UNITS.get(column, "%")
    if any(NO_QUALITY in row["source"] for row in rows):
        unit += f", {NO_QUALITY}"
    title = tag("p", column, " ", tag("small", unit), class_="panel-title", aria_hidden="true")
    drawing = tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label=f"{column}, {unit}: {words}")
    return tag("div", title, drawing, class_="panel")


def _dot(row: Row, x: Any, y: int) -> Html:
    colour = COLOURS.get(METHODS.get(row["row"], ""))
    style = f"--own: {colour}" if colour else None
    parts = [tag("text", row["row"], x=_LEFT - 8, y=y + 4, class_="name")]
    if row["ours_low"] is not None:
        parts.append(tag("line", x1=x(row["ours_low"]), x2=x(row["ours_high"]), y1=y, y2=y, class_="interval"))
    parts.append(tag("circle", cx=x(row["ours"]), cy=y, r=5, class_="ours"))
    printed = _printed(row)
    if printed is not None:
        parts.append(tag("path", d=f"M{x(printed)} {y - 6}l5 6l-5 6l-5 -6z", class_="paper"))
        if row["released"] is not None:
            parts.append(tag("path", d=f"M{x(row['released'])} {y - 6}l5 10h-10z", class_="paper"))
    return tag("g", *parts, style=style)


def _range(rows: Sequence[Row]) -> tuple[float, float]:
    """Lower and upper end of the axis, with a margin."""
    values = [row[name] for row in rows for name in ("ours", "ours_low", "ours_high") if row[name] is not None]
    for row in rows:
        printed = _printed(row)
        if printed is not None:
            values += [printed] + ([row["released"]] if row["released"] is not None else [])
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _printed(row: Row) -> float | None:
    """The printed value where the paper's own model ran."""
    if row["model"] not in PAPER_MODELS or not row["paper"]:
        return None
    try:
        return float(row["paper"])
    except ValueError:  # "22%" or "109 mln": not of a column that is drawn
        return None


def _words(row: Row) -> str:
    """A line of a panel in words."""
    value, low, high = (format_value(row["column"], row[name]) for name in ("ours", "ours_low", "ours_high"))
    return f"{row['row']} {value}" + (f", 95 % interval {low} to {high}" if low else "")
