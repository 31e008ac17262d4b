"""Values of a table as dots with intervals: a small picture a column, a line a row, for the page.

The printed value and the logs' stand beside ours only where the paper's own model ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finetune.report.figures.figure_style import GREY, draw_svg, new_figure, rows_of_dots, styles
from finetune.report.labels import Labels
from finetune.report.model import Cell, Table, format_value
from finetune.report.paper.layouts import PAPER_MODELS

UNITS = {"score": "%", "average": "%", "loss": "nats a token, lower is better", "judged": "1 to 10"}
"""Quantity that is drawn -> its unit."""

NO_QUALITY = "no_quality"
"""Kind of the reason why a judged score says nothing of quality."""

_WIDTH, _LINE, _FRAME = 3.3, 0.26, 0.75  # inches


class Panel(NamedTuple):
    """One column: its label, its unit, its values in words, whether printed values stand beside ours, the picture."""

    title: str
    unit: str
    words: str
    printed: bool
    svg: bytes


def table_panels(table: Table, labels: Labels) -> list[Panel]:
    """The panels of a table: columns of scores, losses or ratings with an interval in some row.

    None of a table on speed, which has a figure of its own, nor of one of averages alone, which repeats others'. An
    average over fewer tasks than the others' stays out: its place beside them would mislead.
    """
    quantities = {cell.quantity for cell in table.cells}
    if "speed" in quantities or not quantities & {"score", "loss"}:
        return []
    found = [cell for cell in table.cells if cell.quantity in UNITS and cell.value is not None]
    tasks = Counter(cell.row for cell in found if cell.quantity == "score")
    drawn = [cell for cell in found if cell.quantity != "average" or tasks[cell.row] == max(tasks.values())]
    rows = [row for row in table.rows if any(cell.row == row for cell in drawn)]
    columns = [[cell for cell in drawn if cell.column == column] for column in table.columns]
    looks = styles([cell.method for cell in drawn], labels.kin)
    return [
        _panel(rows, cells, looks)
        for cells in columns
        if len(cells) > 1 and any(cell.low is not None for cell in cells)
    ]


def _panel(rows: Sequence[str], cells: Sequence[Cell], looks: Mapping[str, tuple[str, str]]) -> Panel:
    unit = UNITS[cells[0].quantity]
    if any(reason.kind == NO_QUALITY for cell in cells for reason in cell.reasons):
        unit += ", no measure of quality"
    with new_figure(_WIDTH, _FRAME + _LINE * len(rows)) as (figure, [[axis]]):
        for cell in cells:
            _line(axis, rows.index(cell.row), cell, looks[cell.method][0])
        rows_of_dots(axis, rows)
        axis.locator_params(axis="x", nbins=4)
        axis.margins(x=0.06)
        printed = any(_is_own(cell) for cell in cells)
        return Panel(cells[0].column, unit, "; ".join(map(_words, cells)), printed, draw_svg(figure))


def _is_own(cell: Cell) -> bool:
    """Whether the paper's own model is behind a cell, so that the printed value may stand beside it."""
    return cell.model in PAPER_MODELS and bool(cell.paper)


def _line(axis: Any, place: int, cell: Cell, colour: str) -> None:
    if cell.low is not None:
        axis.plot([cell.low, cell.high], [place, place], color=colour, linewidth=2.6, alpha=0.6)
    axis.plot([cell.value], [place], "o", color=colour, markersize=6)
    if _is_own(cell):
        axis.plot([float(cell.paper)], [place], "D", mfc="none", mec=GREY, markersize=6)
        if cell.released is not None:
            axis.plot([cell.released], [place], "^", mfc="none", mec=GREY, markersize=6)


def _words(cell: Cell) -> str:
    value, low, high = (format_value(cell.quantity, number) for number in (cell.value, cell.low, cell.high))
    return f"{cell.row} {value}" + (f", 95 % interval {low} to {high}" if low else "")
