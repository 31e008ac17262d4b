"""What the report page is made of: everything that an experiment's stages have left, read once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.mt_bench.judged import current_records
from finetune.published import table_numbers
from finetune.report.figures.figure_style import Words
from finetune.report.labels import Labels
from finetune.report.model import Table, read_table
from finetune.store import records

_NEEDED = ("name", "protocol", "scale", "tasks", "stands_for", "tables")
_NOT_RECORDS = ("before", "chat", "data", "figures", "gradients", "models", "tables")
"""Folders of an experiment without records of its runs: `before` holds those of an earlier commit."""


@dataclass(frozen=True)
class Found:
    """A record and where it lies."""

    path: str
    content: Mapping[str, Any]

    @property
    def run(self) -> Mapping[str, Any]:
        """What was run; empty for a file that is no run's."""
        return self.content.get("run", {})

    @property
    def kind(self) -> str:
        return self.run.get("kind", "")


@dataclass(frozen=True)
class Figure:
    """A figure as its stage left it."""

    name: str
    words: Words
    svg: bytes


@dataclass(frozen=True)
class PageInputs:
    """What the page shows.

    Attributes:
        experiment: The experiment's file: `name`, `protocol`, `scale`, `tasks`, `stands_for`, `tables`.
        labels: Of methods and tasks.
        tables: Name -> the table, the paper's by number, then others; None where it was not built.
        figures: The figures, in the order of the page.
        expected: Name of a figure -> what it shows, of those that an experiment makes, in the order of the page.
        statistics: Content of `statistics.json`; None where it was not run.
        found: The records.
        protocols: What a protocol is for -> name -> content of its file.
        examples: Whether the page of Appendix E is there.
    """

    experiment: Mapping[str, Any]
    labels: Labels
    tables: Mapping[str, Table | None]
    figures: tuple[Figure, ...]
    expected: Mapping[str, str]
    statistics: Mapping[str, Any] | None
    found: tuple[Found, ...]
    protocols: Mapping[str, Mapping[str, Mapping[str, Any]]]
    examples: bool

    def of_kind(self, *kinds: str) -> list[Found]:
        """The records of these kinds, in the order of the kinds."""
        return sorted((one for one in self.found if one.kind in kinds), key=lambda one: kinds.index(one.kind))


def read_inputs(
    results: str | Path,
    *,
    experiment: Mapping[str, Any],
    labels: Labels,
    protocols: Mapping[str, Mapping[str, Mapping[str, Any]]],
    expected: Mapping[str, str],
) -> PageInputs:
    """Read what the stages of an experiment left under `results/<name>`; what is missing is named on the page.

    The other arguments are fields of `PageInputs`.

    Raises:
        ValueError: If the folder is missing, a file is damaged, or the experiment lacks a key.
    """
    results = Path(results)
    if lacking := [key for key in _NEEDED if key not in experiment]:
        raise ValueError(f"the experiment's file lacks {', '.join(lacking)}; see experiments/smoke.yaml.")
    if not results.is_dir():
        raise ValueError(f"{results} does not exist: run the experiment's stages first.")
    built = {path.stem: read_table(path) for path in sorted((results / "tables").glob("*.json"))}
    statistics = results / "statistics.json"
    return PageInputs(
        experiment=experiment,
        labels=labels,
        tables=dict.fromkeys(f"table_{number:02d}" for number in table_numbers()) | built,
        figures=tuple(_figures(results / "figures", [*expected])),
        expected=expected,
        statistics=records.read_json(statistics) if statistics.is_file() else None,
        found=tuple(_records(results)),
        protocols=protocols,
        examples=(results / "examples.html").is_file(),
    )


def _figures(folder: Path, first: list[str]) -> Iterator[Figure]:
    """The figures of a folder: those named first, then the others by name."""
    order = {name: place for place, name in enumerate(first)}
    for path in sorted(folder.glob("*.json"), key=lambda path: (order.get(path.stem, len(order)), path)):
        try:
            yield Figure(path.stem, Words(**records.read_json(path)), path.with_suffix(".svg").read_bytes())
        except (TypeError, FileNotFoundError) as error:
            raise ValueError(f"{path} is damaged ({error}): run the stage that draws it again.") from None


def _records(results: Path) -> Iterator[Found]:
    """The current records below an experiment's folder: those with a provenance."""
    folders = sorted(path for path in results.iterdir() if path.is_dir() and path.name not in _NOT_RECORDS)
    for path in (*(path for folder in folders for path in current_records(folder)), *sorted(results.glob("*.json"))):
        content = records.read_json(path)
        if "provenance" in content:
            if "run" in content:  # what no stage writes any more has none
                records.check_record(path, content)
            yield Found(path.as_posix(), content)
