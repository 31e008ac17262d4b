"""A table as JSON, CSV (everything), Markdown (wide, for readers) and LaTeX (booktabs), each written atomically."""

import csv
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader

from finetune.report import markdown
from finetune.report.model import Cell, Table, format_value, write_table
from finetune.stats.verdicts import MARKS, NOT_RUN, VERDICTS
from finetune.store.files import write_atomically

COLUMNS = (
    *("row", "column", "ours", "ours_low", "ours_high", "n", "paper", "paper_std", "released", "source", "verdict"),
    *("protocol", "model", "records"),
)
"""Columns of the CSV: scores in percent, counts in units of one, intervals at 95 %, `n` runs (or trials)."""

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


def write_files(folder: str | Path, table: Table) -> list[Path]:
    """Write `<name>.json`, `.csv`, `.md` and `.tex`.

    Returns:
        The four paths.

    Raises:
        ValueError: If the table has no cell, a verdict is unknown, or two cells have the same labels.
    """
    if not table.cells:
        raise ValueError(f"{table.name} has no cells; a table has one also for what did not run")
    if wrong := [cell.verdict for cell in table.cells if cell.verdict not in VERDICTS]:
        raise ValueError(f"{table.name}: verdict {wrong[0]!r}; allowed are {', '.join(VERDICTS)}")
    stem = Path(folder) / table.name
    write_table(stem.with_suffix(".json"), table)
    texts = {"csv": to_csv(table)} | {suffix: to_text(suffix, table) for suffix in ("md", "tex")}
    for suffix, text in texts.items():
        write_atomically(stem.with_suffix(f".{suffix}"), text)
    return [stem.with_suffix(f".{suffix}") for suffix in ("json", *texts)]


def to_csv(table: Table) -> str:
    """Render the cells as CSV: numbers with ten digits, an empty field where there is no value."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell in table.cells:
        values = (cell.value, cell.low, cell.high, cell.n, cell.paper, cell.paper_std, cell.released)
        end = (_source(cell), cell.verdict, cell.protocol, cell.model, ";".join(cell.records))
        writer.writerow((cell.row, cell.column, *map(_plain, values), *end))
    return buffer.getvalue()


def to_text(suffix: str, table: Table) -> str:
    """Render a table by a template.

    Args:
        suffix: `md`: a page of title, models, one wide table and notes; `tex`: a LaTeX table with a line each for ours,
            interval, paper, logs and verdict. That needs booktabs, and graphicx to shrink a table of more than four
            columns to the width of the text.
        table: What is rendered.
    """
    found = {(cell.row, cell.column): cell for cell in table.cells}
    rows = [(row, [found.get((row, column)) for column in table.columns]) for row in table.rows]
    heading = f"{table.title} (experiment {table.experiment}{f', protocol {table.protocol}' if table.protocol else ''})"
    notes = [*summary_notes(table), *(f"Warning: {n.text}" if n.kind == "warning" else n.text for n in table.notes)]
    template = _environment(suffix).get_template(f"table.{suffix}.j2")
    return template.render(table=table, heading=heading, rows=rows, notes=notes)


def summary_notes(table: Table) -> list[str]:
    """Say what the cells themselves tell: how many of each verdict, how many runs, what did not run."""
    counts = {verdict: sum(cell.verdict == verdict for cell in table.cells) for verdict in VERDICTS}
    verdicts = f"Verdicts: {', '.join(f'{MARKS[v]} {v} ({count})' for v, count in counts.items())}."
    lines = [verdicts] if table.number else []
    sizes = sorted({cell.n for cell in table.cells if cell.n is not None})
    spread = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else "".join(map(str, sizes))
    lines += [f"n ({table.counted}): {spread}."] if sizes else []
    missing: dict[str, list[str]] = {}
    for cell in table.cells:
        if cell.verdict == NOT_RUN:
            missing.setdefault(cell.row, []).append(cell.column)
    width = len(table.columns)
    cells = [f"{name} ({'all' if len(cols) == width else ', '.join(cols)})" for name, cols in missing.items()]
    return [*lines, f"Not run: {'; '.join(cells) or 'none'}."]


@cache
def _environment(suffix: str) -> Environment:
    loader = PackageLoader(__name__.rpartition(".")[0])
    if suffix == "md":
        found = markdown.environment(loader)
        found.filters["cell"] = _markdown_cell
        return found
    found = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    found.filters |= {"latex": _escape, "lines": _latex_lines}
    return found


def _source(cell: Cell) -> str:
    """Where the values come from, and what speaks against them, in one line of the CSV."""
    parts = {who: f"{who}: {text}" for who, text in cell.sources.items()}
    released = [parts.pop("released")] if "released" in parts else []
    reasons = [f"{cell.verdict}: {', '.join(reason.text for reason in cell.reasons)}"] if cell.reasons else []
    flags = [f"flags: {', '.join(cell.flags)}"] if cell.flags else []
    return "; ".join([*parts.values(), *reasons, *flags, *released])


def _markdown_cell(cell: Cell | None, number: int | None) -> str:
    """Ours with its interval and mark, the paper's, the logs'; a dash where a row has no such column.

    Of a table that the paper lacks (its number is None), ours alone.
    """
    if cell is None:
        return "–"
    if number is None:
        return _number(cell, cell.value)
    ours = cell.verdict
    if cell.value is not None:
        ours = " ".join(part for part in (_number(cell, cell.value), _interval(cell), MARKS[cell.verdict]) if part)
    released = [f"released {_number(cell, cell.released)}"] if cell.released is not None else []
    return " | ".join([ours, _paper(cell) or "not printed", *released])


def _latex_lines(cells: Sequence[Cell | None]) -> dict[str, list[str]]:
    """Lines of one label: ours, interval, paper, released and verdict; those without any value are left out."""
    lines = {
        "ours": [_number(cell, cell.value) if cell else "" for cell in cells],
        "95 % interval": [_interval(cell) if cell else "" for cell in cells],
        "paper": [_paper(cell) if cell else "" for cell in cells],
        "released": [_number(cell, cell.released) if cell else "" for cell in cells],
        "verdict": [MARKS[cell.verdict] if cell else "" for cell in cells],
    }
    return {name: texts for name, texts in lines.items() if any(texts)}


def _number(cell: Cell, value: float | None) -> str:
    return format_value(cell.quantity, value)


def _interval(cell: Cell) -> str:
    return f"[{_number(cell, cell.low)}, {_number(cell, cell.high)}]" if cell.low is not None else ""


def _paper(cell: Cell) -> str:
    text = f"{cell.paper} ± {cell.paper_std}" if cell.paper_std else cell.paper
    return f"{text} (inferred)" if text and "inferred" in cell.flags else text


def _plain(value: object) -> object:
    return format(value, ".10g") if isinstance(value, float) else value


def _escape(text: str) -> str:
    """Escape a text for LaTeX, on one line; a leading bracket or star would be read as the line break's before it."""
    escaped = "".join(_LATEX.get(mark, mark) for mark in " ".join(text.split()))
    return f"{{{escaped}}}" if escaped.startswith(("[", "*")) else escaped
