"""The tables on the page, laid out for narrow and wide screens.

A label takes up to three lines: ours with its interval and verdict, the paper's, the released logs'; where a table has
few columns they stand side by side instead. A line that would be empty is left out; what is missing in one that stays
says why.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from finetune.report.model import Cell, Table, format_value
from finetune.stats import verdicts

LONG = 14
"""Labels above which a table is folded away until it is asked for."""

FEW = 3
"""Columns up to which a column has ours, the paper's and the logs' side by side."""


def anchor_of(name: str) -> str:
    """Id of the heading of a table or figure: ``table-09`` of ``table_09``."""
    return name.replace("_", "-")


def heading_of(name: str) -> str:
    """Heading of a table by the stem of its files: "Table 9" of ``table_09``."""
    return " ".join(part.lstrip("0") for part in name.split("_")).capitalize()


def layout(table: Table) -> dict[str, Any]:
    """What the template needs besides the table.

    Returns:
        `columns`: (label, which of ours, paper and logs it has); `rows`: (label, the same, cells, None where there is
        none); `across`: whether those stand side by side; `long`: whether it is folded away; `counts`: verdict ->
        number of cells; `reasons`: why cells are not run or not comparable -> which cells; `warnings` and `notes`.
    """
    columns = [(name, _kinds(cell for cell in table.cells if cell.column == name)) for name in table.columns]
    rows = []
    for row in table.rows:
        own = {cell.column: cell for cell in table.cells if cell.row == row}
        rows.append((row, _kinds(own.values()), [own.get(column) for column in table.columns]))
    counts = Counter(cell.verdict for cell in table.cells)
    return {
        "columns": columns,
        "rows": rows,
        "across": len(columns) <= FEW,
        "long": len(rows) > LONG,
        "counts": {verdict: counts[verdict] for verdict in verdicts.VERDICTS if counts[verdict]},
        "reasons": _reasons(table),
        "warnings": list(dict.fromkeys(note.text for note in table.notes if note.kind == "warning")),
        "notes": [note.text for note in table.notes if note.kind != "warning"],
    }


def interval_of(cell: Cell) -> str:
    """A cell's interval; empty where it has none."""
    low, high = (format_value(cell.quantity, end) for end in (cell.low, cell.high))
    return f"[{low}, {high}]" if low else ""


def shown(cell: Cell) -> str:
    """A value with its interval in one text."""
    return f"{format_value(cell.quantity, cell.value)} {interval_of(cell) or '[no interval]'}"


def _kinds(cells: Iterable[Cell]) -> list[str]:
    """Which of ours, the paper's and the logs' numbers there are; ours always stands."""
    printed, logged = zip(*((cell.paper, cell.released is not None) for cell in cells), strict=True)
    return ["ours", *(["paper"] if any(printed) else []), *(["logs"] if any(logged) else [])]


def _reasons(table: Table) -> dict[str, str]:
    """Each reason once, with its cells."""
    found: dict[str, list[Cell]] = defaultdict(list)
    for cell in table.cells:
        if cell.verdict in (verdicts.NOT_RUN, verdicts.NOT_COMPARABLE):
            for reason in cell.reasons:
                found[f"{cell.verdict}: {reason.text}"].append(cell)
    return {reason: _where(cells, table) for reason, cells in found.items()}


def _where(cells: Sequence[Cell], table: Table) -> str:
    """Name cells by rows and columns, in few words."""
    rows, columns = (list(dict.fromkeys(getattr(cell, side) for cell in cells)) for side in ("row", "column"))
    if len(rows) * len(columns) != len(cells):
        return "; ".join(f"{row} ({', '.join(cell.column for cell in cells if cell.row == row)})" for row in rows)
    every_row, every_column = len(rows) == len(table.rows), len(columns) == len(table.columns)
    return f"{'all rows' if every_row else ', '.join(rows)} ({'all columns' if every_column else ', '.join(columns)})"
