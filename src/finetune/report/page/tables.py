"""The tables on the page: cells as texts, laid out for narrow and wide screens.

A label takes up to three lines: ours with its interval and verdict, the paper's, the released logs'; where a table has
few columns they stand side by side instead. A line that would be empty is left out; what is missing in one that stays
says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.report.model import Cell, Table, format_value
from finetune.stats import verdicts

LONG = 14
"""Labels above which a table is folded away until it is asked for."""

FEW = 3
"""Columns up to which a column has ours, the paper's and the logs' side by side."""


@dataclass(frozen=True)
class CellView:
    """A cell as texts; empty where there is none."""

    ours: str
    interval: str
    verdict: str
    paper: str
    inferred: bool
    logs: str


@dataclass(frozen=True)
class RowView:
    """A row: its label, its cells (None: not in this table), which of ours, paper and logs it has."""

    label: str
    cells: tuple[CellView | None, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class TableView:
    """A table for the template.

    Attributes:
        name: Stem of its files.
        anchor: Id of its heading.
        heading, title: "Table 9" and what it is about.
        models: Sentences on the models behind it.
        counts: (verdict, number of cells).
        across: Whether ours, the paper's and the logs' stand side by side.
        long: Whether it is folded away.
        columns: (label, which of ours, paper and logs it has).
        rows: The rows.
        reasons: (why cells are not run or not comparable, which cells).
        warnings: Notes that stand in sight.
        notes: The other notes.
    """

    name: str
    anchor: str
    heading: str
    title: str
    models: tuple[str, ...]
    counts: tuple[tuple[str, int], ...]
    across: bool
    long: bool
    columns: tuple[tuple[str, tuple[str, ...]], ...]
    rows: tuple[RowView, ...]
    reasons: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def anchor_of(name: str) -> str:
    """Id of the heading of a table or figure: ``table-09`` of ``table_09``."""
    return name.replace("_", "-")


def heading_of(table: Table) -> str:
    """ "Table 9", or a table's name where the paper has none like it."""
    return f"Table {table.number}" if table.number is not None else table.name.replace("_", " ").capitalize()


def view(table: Table) -> TableView:
    """Lay a table out."""
    cells = {(cell.row, cell.column): cell for cell in table.cells}
    lines = [(label, [cells.get((label, column)) for column in table.columns]) for label in table.rows]
    columns = [(column, _kinds([cells.get((label, column)) for label in table.rows])) for column in table.columns]
    counts = Counter(cell.verdict for cell in table.cells)
    notes = {kind: tuple(dict.fromkeys(note.text for note in table.notes if (note.kind == "warning") is kind))
             for kind in (True, False)}  # fmt: skip
    return TableView(
        name=table.name,
        anchor=anchor_of(table.name),
        heading=heading_of(table),
        title=table.title,
        models=table.models,
        counts=tuple((verdict, counts[verdict]) for verdict in verdicts.VERDICTS if counts[verdict]),
        across=len(columns) <= FEW,
        long=len(lines) > LONG,
        columns=tuple(columns),
        rows=tuple(RowView(label, tuple(map(_cell, found)), _kinds(found)) for label, found in lines),
        reasons=tuple(_reasons(table)),
        warnings=notes[True],
        notes=notes[False],
    )


def shown(cell: Cell) -> str:
    """A value with its interval in one text."""
    value, interval = format_value(cell.quantity, cell.value), _interval(cell)
    return f"{value} {interval or '[no interval]'}"


def _interval(cell: Cell) -> str:
    low, high = (format_value(cell.quantity, end) for end in (cell.low, cell.high))
    return f"[{low}, {high}]" if low else ""


def _cell(cell: Cell | None) -> CellView | None:
    if cell is None:
        return None
    return CellView(
        ours=format_value(cell.quantity, cell.value),
        interval=_interval(cell),
        verdict=cell.verdict,
        paper=f"{cell.paper} ± {cell.paper_std}" if cell.paper_std else cell.paper,
        inferred="inferred" in cell.flags,
        logs=format_value(cell.quantity, cell.released),
    )


def _kinds(cells: Sequence[Cell | None]) -> tuple[str, ...]:
    """Which of ours, the paper's and the logs' numbers there are; ours always stands."""
    known = [cell for cell in cells if cell is not None]
    there = {"paper": any(cell.paper for cell in known), "logs": any(cell.released is not None for cell in known)}
    return ("ours", *(kind for kind, found in there.items() if found))


def _reasons(table: Table) -> list[tuple[str, str]]:
    """Each reason once, with its cells."""
    found: dict[str, list[Cell]] = {}
    for cell in table.cells:
        if cell.verdict in (verdicts.NOT_RUN, verdicts.NOT_COMPARABLE):
            for reason in cell.reasons:
                found.setdefault(f"{cell.verdict}: {reason.text}", []).append(cell)
    return [(reason, _where(cells, table)) for reason, cells in found.items()]


def _where(cells: Sequence[Cell], table: Table) -> str:
    """Name cells by rows and columns, in few words."""
    rows, columns = (list(dict.fromkeys(getattr(cell, side) for cell in cells)) for side in ("row", "column"))
    if len(rows) * len(columns) != len(cells):
        return "; ".join(f"{row} ({', '.join(cell.column for cell in cells if cell.row == row)})" for row in rows)
    all_rows, all_columns = len(rows) == len(table.rows), len(columns) == len(table.columns)
    places = "all rows" if all_rows else ", ".join(rows), "all columns" if all_columns else ", ".join(columns)
    return f"{places[0]} ({places[1]})"
