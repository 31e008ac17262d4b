"""The tables of the paper on the page: read back from their CSV and Markdown, laid out for narrow and wide screens.

A label takes up to three lines: ours with its interval and verdict, the paper's, the released logs'; where a table has
few columns they stand side by side instead. A line that would be empty is left out; what is missing in one that stays
says why.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.published import TASKS
from finetune.report.page.markup import Child, Html, items, join, scrolled, tag
from finetune.report.tables.rows import COLUMNS
from finetune.report.tables.writers import format_value
from finetune.stats import verdicts

Row = Mapping[str, Any]

LONG = 14
"""Labels above which a table is folded away until it is asked for."""

FEW = 3
"""Columns up to which a column has ours, the paper's and the logs' side by side."""

_VALUES = ("ours", "ours_low", "ours_high", "released")


@dataclass(frozen=True)
class BuiltTable:
    """A table as its stage left it.

    Attributes:
        number: In the paper.
        title: What it is about.
        lead: Sentences on the models behind it.
        notes: Sentences under it.
        rows: One dict with the keys `finetune.report.tables.rows.COLUMNS` a cell; values are numbers or None.
    """

    number: int
    title: str
    lead: tuple[str, ...]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]

    def count(self, verdict: str) -> int:
        """Number of cells with a verdict."""
        return sum(row["verdict"] == verdict for row in self.rows)


def read_table(folder: str | Path, number: int) -> BuiltTable | None:
    """Read `table_NN.csv` and `table_NN.md`.

    Args:
        folder: Folder of the tables.
        number: Number of the table in the paper.

    Returns:
        The table, or None where there is no such file.

    Raises:
        ValueError: If one of the two is missing, a column is missing, or the Markdown is not the writer's.
    """
    source, page = (Path(folder) / f"table_{number:02d}.{suffix}" for suffix in ("csv", "md"))
    if not source.is_file():
        return None
    if not page.is_file():
        raise ValueError(f"{source} is there and {page} is not: run the stage table_{number:02d} again.")
    with source.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS or not rows:
        raise ValueError(f"{source}: columns {reader.fieldnames}, {len(rows)} rows; {COLUMNS} and a row are needed.")
    title, lead, notes = _words(page)
    return BuiltTable(number, title, lead, notes, tuple(_typed(rows)))


def table_html(table: BuiltTable, after: Child = None) -> Html:
    """The section of a table: title, models, legend, cells, reasons and notes.

    Args:
        table: The table.
        after: What stands between the cells and the reasons.
    """
    labels = list(dict.fromkeys(row["row"] for row in table.rows))
    grid = _grid(table, labels)
    if len(labels) > LONG:
        words = f"Show the {len(labels)} rows of Table {table.number}"
        grid = tag("details", tag("summary", words), "\n", grid, class_="fold")
    name = f"table-{table.number:02d}"
    return tag(
        "section",
        "\n",
        tag("h3", f"Table {table.number}", tag("small", table.title), id=name),
        "\n",
        *(join([tag("p", text, class_="lead"), "\n"]) for text in table.lead),
        _counts(table),
        "\n",
        grid,
        "\n",
        after,
        _reasons(table),
        _notes(table),
        aria_labelledby=name,
        class_="result",
    )


def legend() -> Html:
    """What the marks say."""
    lines = [
        join([tag("dt", _mark(verdict)), tag("dd", tag("b", verdict), f": {verdicts.MEANINGS[verdict]}")])
        for verdict in verdicts.MARKS
    ]
    return tag("dl", join(lines, "\n"), class_="legend")


def _words(path: Path) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Title, sentences before the cells, and notes of the writer's Markdown."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = re.fullmatch(r"# Table \d+ of the paper: (.*) \(experiment [^()]*\)", lines[0] if lines else "")
    if found is None or "Notes" not in lines:
        raise ValueError(f"{path} is not a table's page: run the stage that writes it again.")
    cells = next((place for place, line in enumerate(lines) if line.startswith(("Each cell:", "|"))), len(lines))
    lead = tuple(line for line in lines[1:cells] if line)
    notes = [line.removeprefix("- ") for line in lines[lines.index("Notes") + 1 :] if line.startswith("- ")]
    return found[1], lead, tuple(notes)


def _typed(rows: Sequence[dict[str, str]]) -> Iterable[dict[str, Any]]:
    """Numbers as numbers: a column whose values are all whole holds counts, unless it is one of scores."""
    whole = dict.fromkeys((*TASKS.values(), "AVG"), False)
    for row in rows:
        texts = [row[name] for name in _VALUES if row[name]]
        whole[row["column"]] = whole.get(row["column"], True) and all(re.fullmatch(r"-?\d+", text) for text in texts)
    for row in rows:
        if row["verdict"] not in verdicts.MARKS:
            raise ValueError(
                f"verdict {row['verdict']!r}; allowed are {', '.join(verdicts.MARKS)}: write the table again."
            )
        parse = int if whole[row["column"]] else float
        yield row | {name: parse(row[name]) if row[name] else None for name in _VALUES}


def _grid(table: BuiltTable, labels: Sequence[str]) -> Html:
    """The cells: few columns side by side with the paper's, many with the paper's below."""
    columns = list(dict.fromkeys(row["column"] for row in table.rows))
    found = {(row["row"], row["column"]): row for row in table.rows}
    lines = [[found.get((label, column)) for column in columns] for label in labels]
    caption = f"Table {table.number}: {table.title}"
    across = len(columns) <= FEW
    body = (_across if across else _below)(labels, columns, lines)
    name = tag("caption", caption, class_="hidden")
    return scrolled(tag("table", name, "\n", body, "\n", class_="cells across" if across else "cells"), caption)


def _across(labels: Sequence[str], columns: Sequence[str], lines: Sequence[Sequence[Row | None]]) -> Html:
    """One line a label; under each column its own three."""
    kinds = [_kinds([line[place] for line in lines]) for place in range(len(columns))]
    spans = zip(columns, kinds, strict=True)
    top = [tag("th", column, scope="colgroup", colspan=len(own)) for column, own in spans]
    low = [tag("th", kind, scope="col", class_=kind) for own in kinds for kind in own]
    corner = tag("th", _ROW, scope="col", rowspan=2)
    head = tag("thead", tag("tr", corner, *top), "\n", tag("tr", *low))
    rows = [
        tag(
            "tr",
            tag("th", label, scope="row"),
            *(_CELLS[kind](row) for row, own in zip(line, kinds, strict=True) for kind in own),
        )
        for label, line in zip(labels, lines, strict=True)
    ]
    return join([head, tag("tbody", join(rows, "\n"))], "\n")


def _below(labels: Sequence[str], columns: Sequence[str], lines: Sequence[Sequence[Row | None]]) -> Html:
    """Up to three lines a label."""
    head = tag("tr", tag("th", _ROW, scope="col"), *(tag("th", column, scope="col") for column in columns))
    bodies = []
    for label, line in zip(labels, lines, strict=True):
        rows = []
        for kind in _kinds(line):
            name = join([label, tag("small", kind)], " ") if kind == "ours" else join([_hidden(f"{label}, "), kind])
            rows.append(tag("tr", tag("th", name, scope="row"), *map(_CELLS[kind], line), class_=kind))
        bodies.append(tag("tbody", join(rows, "\n")))
    return join([tag("thead", head), *bodies], "\n")


def _kinds(cells: Sequence[Row | None]) -> list[str]:
    """Which of ours, the paper's and the logs' numbers there are; ours always stands."""
    known = [cell for cell in cells if cell is not None]
    paper, logs = any(cell["paper"] for cell in known), any(cell["released"] is not None for cell in known)
    return ["ours", *(["paper"] if paper else []), *(["logs"] if logs else [])]


def _hidden(text: str) -> Html:
    """A text for screen readers alone."""
    return tag("span", text, class_="hidden")


def _ours(row: Row | None) -> Html:
    if row is None:
        return tag("td", "not in this table", class_="none")
    if row["ours"] is None:
        return tag("td", row["verdict"], class_="none")
    value = tag("b", format_value(row["column"], row["ours"]))
    low, high = (row[name] for name in ("ours_low", "ours_high"))
    shown = f"[{format_value(row['column'], low)}, {format_value(row['column'], high)}]" if low is not None else None
    return tag("td", value, " ", _mark(row["verdict"]), tag("span", shown, class_="interval") if shown else None)


def _paper(row: Row | None) -> Html:
    if row is None or not row["paper"]:
        return tag("td", "not printed", class_="none")
    inferred = tag("i", " inferred") if row["source"].startswith("paper: inferred") else None
    text = f"{row['paper']} ± {row['paper_std']}" if row["paper_std"] else row["paper"]
    return tag("td", text, inferred, class_="paper")


def _released(row: Row | None) -> Html:
    if row is None or row["released"] is None:
        return tag("td", "no log", class_="none")
    return tag("td", format_value(row["column"], row["released"]), class_="logs")


_CELLS = {"ours": _ours, "paper": _paper, "logs": _released}
_ROW = _hidden("row")


def _mark(verdict: str) -> Html:
    return tag("span", verdicts.MARKS[verdict], class_=f"mark {verdict.replace(' ', '-')}", title=verdict)


def _counts(table: BuiltTable) -> Html:
    """How many cells have which verdict."""
    parts = [
        tag("li", _mark(verdict), f" {verdict} {table.count(verdict)}")
        for verdict in verdicts.MARKS
        if table.count(verdict)
    ]
    return tag("ul", *parts, class_="counts", aria_label=f"Verdicts of Table {table.number}")


def _reasons(table: BuiltTable) -> Html:
    """Why cells are not run or not comparable: each reason once, with its cells."""
    found: dict[str, list[Row]] = {}
    for row in table.rows:
        if row["verdict"] in (verdicts.NOT_RUN, verdicts.NOT_COMPARABLE):
            for reason in reasons_of(row):
                found.setdefault(reason, []).append(row)
    if not found:
        return Html("")
    lines = [
        join([reason, ": ", tag("span", _where(rows, table.rows), class_="quiet")]) for reason, rows in found.items()
    ]
    words = f"Why cells are not run or not comparable ({len(lines)})"
    return join([tag("details", tag("summary", words), "\n", items(lines)), "\n"])


def reasons_of(row: Row) -> list[str]:
    """The reservations in a cell's `source`, without where its values come from."""
    parts = [part for part in row["source"].split("; ") if part]
    plain = [part for part in parts if not part.startswith(("paper:", "ours:", "released:"))]
    return [f"{row['verdict']}: {part.removeprefix('not comparable: ')}" for part in plain]


def _where(rows: Sequence[Row], all_rows: Sequence[Row]) -> str:
    """Name cells by rows and columns, in few words."""
    labels = list(dict.fromkeys(row["row"] for row in rows))
    columns = list(dict.fromkeys(row["column"] for row in rows))
    if len(labels) * len(columns) != len(rows):
        return "; ".join(
            f"{label} ({', '.join(row['column'] for row in rows if row['row'] == label)})" for label in labels
        )
    every_row = len(labels) == len({row["row"] for row in all_rows})
    every_column = len(columns) == len({row["column"] for row in all_rows})
    return f"{'all rows' if every_row else ', '.join(labels)} ({'all columns' if every_column else ', '.join(columns)})"


def _notes(table: BuiltTable) -> Html:
    warnings = [note for note in table.notes if note.startswith("Warning")]
    shown = [tag("p", note, class_="warning") for note in dict.fromkeys(warnings)]
    rest: list[Child] = [note for note in table.notes if note not in warnings and not note.startswith("Every cell's")]
    file = f"tables/table_{table.number:02d}.csv"
    rest.append(join(["Full precision, sources and records of every cell: ", tag("a", file, href=file), "."]))
    folded = tag("details", tag("summary", f"Notes ({len(rest)})"), "\n", items(rest))
    return join([*shown, folded, "\n"])
