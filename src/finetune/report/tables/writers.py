"""A table as CSV (everything), Markdown (wide, for readers) and LaTeX (booktabs), each written atomically.

The writers know rows and columns only, so that every table of the project can use them: a cell is a dict with the keys
`rows.COLUMNS`, laid out by its `row` and `column` in the order of their first appearance.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.published import table_numbers
from finetune.report.tables.rows import COLUMNS
from finetune.stats import verdicts
from finetune.store.files import write_atomically

Row = Mapping[str, Any]

_NO_CELL = "–"
"""Where a row has no such column: a ratio of scores, say."""

_FORMATS = {"learning rate": ".2e", "Valid Loss": ".4f", "I-Bench Score": ".3f"}
"""Column -> format of its values."""

_LATEX = {
    "\\": r"\textbackslash{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "≠": r"$\neq$",
    "–": "--",
}


@dataclass(frozen=True)
class Context:
    """What a reader must know about a table besides its cells.

    Attributes:
        experiment: Name of the experiment.
        protocol: Name of the protocol; empty where none applies.
        title: What the table is about.
        models: Sentences: which model stands in which model's place, and that another model is not the paper's.
        notes: Sentences under the table, besides those that the rows themselves give (n, not run, verdicts).
        counted: What `n` counts.
    """

    experiment: str
    protocol: str
    title: str
    models: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    counted: str = "runs, or completed trials of a search"


def write_table(folder: str | Path, number: int, rows: Sequence[Row], context: Context) -> list[Path]:
    """Write `table_NN.csv`, `table_NN.md` and `table_NN.tex`.

    Args:
        folder: Folder of the tables; made if missing.
        number: Number of the table in the paper.
        rows: One dict with the keys `COLUMNS` per cell.
        context: What stands around the table.

    Returns:
        The three paths.

    Raises:
        ValueError: If the number is not one of the paper's tables, there is no row, a row has other keys, or two rows
            are of the same cell.
    """
    if number not in table_numbers():
        raise ValueError(f"unknown table number {number!r}; the paper's tables on file are {table_numbers()}")
    _check(rows)
    texts = {"csv": to_csv(rows), "md": to_markdown(number, rows, context), "tex": to_latex(number, rows, context)}
    paths = []
    for suffix, text in texts.items():
        path = Path(folder) / f"table_{number:02d}.{suffix}"
        write_atomically(path, text)
        paths.append(path)
    return paths


def to_csv(rows: Sequence[Row]) -> str:
    """Render the rows as CSV: full precision, an empty field where there is no value."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _plain(row[name]) for name in COLUMNS})
    return buffer.getvalue()


def to_markdown(number: int, rows: Sequence[Row], context: Context) -> str:
    """Render the rows as a Markdown page: title, models, one wide table, notes."""
    labels, columns, grid = _grid(rows)
    lines = [f"# {_heading(number, context)}", "", *context.models, "", f"Each cell: {_legend(rows)}.", ""]
    lines += [_markdown_line(["", *columns]), _markdown_line(["---"] * (len(columns) + 1))]
    for label in labels:
        found = [grid.get((label, column)) for column in columns]
        lines.append(_markdown_line([label, *(_markdown_cell(row) if row else _NO_CELL for row in found)]))
    lines += ["", "Notes", "", *(f"- {note}" for note in _notes(rows, context))]
    return "\n".join(lines) + "\n"


def to_latex(number: int, rows: Sequence[Row], context: Context) -> str:
    """Render the rows as a LaTeX table: per label one line each for ours, interval, paper, released and verdict.

    It needs booktabs, and graphicx to shrink a table of more than four columns to the width of the text.
    """
    labels, columns, grid = _grid(rows)
    caption = " ".join([f"{_heading(number, context)}.", *context.models])
    wide = len(columns) > 4
    lines = [r"\begin{table}", r"\centering\footnotesize", f"\\caption{{{_escape(caption)}}}"]
    lines += [f"\\label{{tab:{context.experiment}-{number:02d}}}"]
    lines += [r"\resizebox{\textwidth}{!}{%"] if wide else []
    lines += [f"\\begin{{tabular}}{{ll{'r' * len(columns)}}}"]
    lines += [r"\toprule", _latex_line(["", "", *columns]), r"\midrule"]
    for position, label in enumerate(labels):
        found = [grid.get((label, column)) for column in columns]
        lines += [r"\addlinespace"] if position else []
        lines += [_latex_line(line) for line in _latex_lines(label, found)]
    lines += [r"\bottomrule", r"\end{tabular}}" if wide else r"\end{tabular}", r"\par\smallskip\raggedright"]
    lines += [f"{_escape(note)}\\par" for note in _notes(rows, context)]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def format_value(column: str, value: float | None) -> str:
    """Format a value for readers: some by their column, counts with separators, the rest to 0.01; nothing if `None`."""
    if value is None:
        return ""
    if column in _FORMATS:
        return format(value, _FORMATS[column])
    if column.endswith((" share", "#Train params")):
        return f"{value:.2f}%" if value >= 1 else f"{value:.3g}%"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _legend(rows: Sequence[Row]) -> str:
    """Say what the parts of a Markdown cell are, as far as the table has them."""
    interval = " [95 % interval]" if any(row["ours_low"] is not None for row in rows) else ""
    deviation = " ± its deviation" if any(row["paper_std"] for row in rows) else ""
    released = any(row["released"] is not None for row in rows)
    parts = [f"ours{interval} and the verdict's mark", f"the paper's{deviation}"]
    return " | ".join(parts + (["the authors' released logs'"] if released else []))


def _heading(number: int, context: Context) -> str:
    protocol = f", protocol {context.protocol}" if context.protocol else ""
    return f"Table {number} of the paper: {context.title} (experiment {context.experiment}{protocol})"


def _notes(rows: Sequence[Row], context: Context) -> list[str]:
    """Say what the rows themselves tell: how many runs, what did not run, how many of each verdict."""
    sizes = sorted({row["n"] for row in rows if row["n"] is not None})
    spread = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else "".join(map(str, sizes))
    missing: dict[str, list[str]] = {}
    for row in rows:
        if row["verdict"] == verdicts.NOT_RUN:
            missing.setdefault(row["row"], []).append(row["column"])
    width = len({row["column"] for row in rows})
    cells = [f"{name} ({'all' if len(cols) == width else ', '.join(cols)})" for name, cols in missing.items()]
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in verdicts.VERDICTS}
    legend = ", ".join(f"{verdicts.MARKS[verdict]} {verdict} ({count})" for verdict, count in counts.items())
    lines = [f"Verdicts: {legend}."]
    lines += [f"n ({context.counted}): {spread}."] if sizes else []
    lines += [f"Not run: {'; '.join(cells)}." if cells else "Not run: none."]
    return [*lines, *context.notes, "Every cell's sources and records are in the CSV file of the same name."]


def _markdown_cell(row: Row) -> str:
    released = [_number(row, "released")] if row["released"] is not None else []
    parts = [_ours(row), _paper(row), *(f"released {value}" for value in released)]
    return " | ".join(parts)


def _ours(row: Row) -> str:
    if row["ours"] is None:
        return row["verdict"]
    return " ".join(part for part in (_number(row, "ours"), _interval(row), verdicts.MARKS[row["verdict"]]) if part)


def _interval(row: Row) -> str:
    return f"[{_number(row, 'ours_low')}, {_number(row, 'ours_high')}]" if row["ours_low"] is not None else ""


def _paper(row: Row) -> str:
    text = f"{row['paper']} ± {row['paper_std']}" if row["paper_std"] else row["paper"] or "not printed"
    return f"{text} (inferred)" if row["paper"] and row["source"].startswith("paper: inferred") else text


def _latex_lines(label: str, found: Sequence[Row | None]) -> list[list[str]]:
    """Lines of one label: ours, interval, paper, released and verdict; those without any value are left out."""
    cells = {
        "ours": [_number(row, "ours") if row else "" for row in found],
        "95 % interval": [_interval(row) if row else "" for row in found],
        "paper": [_paper(row) if row and row["paper"] else "" for row in found],
        "released": [_number(row, "released") if row else "" for row in found],
        "verdict": [verdicts.MARKS[row["verdict"]] if row else "" for row in found],
    }
    lines = [[name, *texts] for name, texts in cells.items() if any(texts)]
    return [[label if position == 0 else "", *line] for position, line in enumerate(lines)]


def _number(row: Row, name: str) -> str:
    return format_value(row["column"], row[name])


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return format(value, ".10g") if isinstance(value, float) else str(value)


def _grid(rows: Sequence[Row]) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    """Labels of rows and columns in the order of their first appearance, and the cells by both."""
    labels = list(dict.fromkeys(row["row"] for row in rows))
    columns = list(dict.fromkeys(row["column"] for row in rows))
    return labels, columns, {(row["row"], row["column"]): row for row in rows}


def _markdown_line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _latex_line(texts: Sequence[str]) -> str:
    return " & ".join(_escape(text) for text in texts) + r" \\"


def _escape(text: str) -> str:
    """Escape a text for LaTeX; a leading bracket would be read as the argument of the line break before it."""
    escaped = "".join(_LATEX.get(mark, mark) for mark in text)
    return f"{{{escaped}}}" if escaped.startswith("[") else escaped


def _check(rows: Sequence[Row]) -> None:
    if not rows:
        raise ValueError("got no rows; a table has one per cell, also for what did not run (build_table gives them)")
    seen = set()
    for row in rows:
        if set(row) != set(COLUMNS):
            raise ValueError(f"a row has the keys {sorted(row)}; allowed and needed are {sorted(COLUMNS)}")
        if row["verdict"] not in verdicts.VERDICTS:
            raise ValueError(f"verdict {row['verdict']!r}; allowed are {', '.join(verdicts.VERDICTS)}")
        key = (row["row"], row["column"])
        if key in seen:
            raise ValueError(f"two rows of the cell {key}; one per cell is allowed: remove or rename one")
        seen.add(key)
