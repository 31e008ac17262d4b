"""A table as data: a table stage writes it as JSON, and CSV, Markdown, LaTeX and the page are rendered from it.

What decides anything is a field of its own (`verdict`, a reason's `kind`, `flags`); texts are for readers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.store import records

SCHEMA = 1

_FORMATS = {"learning_rate": ".2e", "loss": ".4f", "judged": ".3f"}
_PERCENT = ("share", "trained_share")
_EMPTY = (None, "", (), {})


@dataclass(frozen=True)
class Reason:
    """Why a cell has no value, or may not be compared with the print.

    Attributes:
        kind: A word that code may ask for: `other_model`, `protocol`, `scale`, `not_printed`, `no_run`, `no_quality`.
        text: The same for readers.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Note:
    """A remark below a table; `kind` is `warning`, `rule`, `mark`, `loss` or another word that code may ask for."""

    kind: str
    text: str


@dataclass(frozen=True)
class Cell:
    """One cell; scores in percent, counts in units of one, intervals at 95 %.

    Attributes:
        row: Row label.
        column: Column label.
        quantity: What the value is, such as `score`; it decides how the value is formatted (`format_value`).
        method: Name of the method behind it, or of the variant of tables 3, 7 and 8; empty where none is.
        task: Name of the task behind it, likewise.
        value: Ours; `None` where nothing ran.
        low: Lower end of its interval.
        high: Upper end.
        n: Runs, trials or items behind it.
        paper: The printed value as printed, empty where there is none.
        paper_std: The printed deviation, likewise.
        released: The value of the authors' logs.
        verdict: One of `finetune.stats.verdicts`.
        reasons: Why it has no value or may not be compared.
        flags: Words such as `inferred` (of the printed value), `failed_runs`, `mixed_versions`, `partial_average`,
            `ablation` (of the row), `over_full` (a ratio to full fine-tuning's).
        sources: `ours`, `paper`, `released` -> what the value was computed from.
        protocol: Name of the protocol behind ours.
        model: Name of the model behind ours.
        records: Paths of the records behind ours.
    """

    row: str
    column: str
    quantity: str
    method: str = ""
    task: str = ""
    value: float | int | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    paper: str = ""
    paper_std: str = ""
    released: float | None = None
    verdict: str = ""
    reasons: tuple[Reason, ...] = ()
    flags: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    protocol: str = ""
    model: str = ""
    records: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A built table.

    Attributes:
        number: The paper's number; `None` of a table that the paper lacks.
        name: Stem of its files, such as `table_09`.
        title: What it is about.
        experiment: Name of the experiment.
        protocol: Name of the protocol, empty where none applies.
        cells: In the order of reading, row by row.
        models: Sentences on which model stands in the place of which.
        notes: What stands below it.
        counted: What `n` counts.
    """

    number: int | None
    name: str
    title: str
    experiment: str
    protocol: str
    cells: tuple[Cell, ...]
    models: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    counted: str = "runs, or completed trials of a search"

    @property
    def rows(self) -> tuple[str, ...]:
        """Row labels in the order of their first appearance."""
        return tuple(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def columns(self) -> tuple[str, ...]:
        """Column labels likewise."""
        return tuple(dict.fromkeys(cell.column for cell in self.cells))

    def cell(self, row: str, column: str) -> Cell | None:
        """The cell of two labels, or `None`."""
        return next((cell for cell in self.cells if (cell.row, cell.column) == (row, column)), None)


def format_value(quantity: str, value: float | None) -> str:
    """Format a value for readers: some by their quantity, counts with separators, the rest to 0.01; `None`: nothing."""
    if value is None:
        return ""
    if quantity in _PERCENT:
        return f"{value:.2f}%" if value >= 1 else f"{value:.3g}%"
    if quantity in _FORMATS:
        return format(value, _FORMATS[quantity])
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def write_table(path: str | Path, table: Table) -> None:
    """Write a table as JSON, whole or not at all.

    Raises:
        ValueError: If two cells have the same labels, or a value is not finite.
    """
    labels = [(cell.row, cell.column) for cell in table.cells]
    twice = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
    if twice:
        raise ValueError(f"{table.name}: two cells of {twice[0]}; one is allowed: remove or rename one")
    cells = [{name: value for name, value in asdict(cell).items() if value not in _EMPTY} for cell in table.cells]
    records.write_json(path, {"schema": SCHEMA} | asdict(replace(table, cells=())) | {"cells": cells})


def read_table(path: str | Path) -> Table:
    """Read a table that `write_table` wrote.

    Raises:
        ValueError: If the file is missing, damaged or of another schema.
    """
    content: dict[str, Any] = records.read_json(path)
    if content.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path} is no table of schema {SCHEMA}: run the stage that writes it again")
    try:
        cells = tuple(
            Cell(
                **cell
                | {name: tuple(cell.get(name, ())) for name in ("flags", "records")}
                | {"reasons": tuple(Reason(**one) for one in cell.get("reasons", ()))}
            )
            for cell in content.pop("cells")
        )
        notes = tuple(Note(**note) for note in content.pop("notes"))
        return Table(**content | {"cells": cells, "notes": notes, "models": tuple(content["models"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): run the stage that writes it again") from None
