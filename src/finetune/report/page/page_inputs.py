"""What the report page is made of: everything that an experiment's stages have left, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.published import table_numbers
from finetune.report.page.page_figures import Figure, read_figures
from finetune.report.page.page_records import Found, read_found
from finetune.report.page.page_tables import BuiltTable, read_table
from finetune.store import records


@dataclass(frozen=True)
class PageInputs:
    """What the page shows.

    Attributes:
        experiment: The experiment's file: `name`, `protocol`, `scale`, `tasks`, `stands_for`, `tables`.
        tables: Number in the paper -> the table; None where it was not built.
        figures: The figures, in the order of the page.
        expected: Name of a figure -> what it shows, of those that an experiment makes.
        statistics: Content of `statistics.json`; None where it was not run.
        statistics_page: Text of `statistics.md`; None where it was not run.
        found: The records.
        protocols: What a protocol is for -> name -> content of its file.
        examples: Whether the page of Appendix E is there.
    """

    experiment: Mapping[str, Any]
    tables: Mapping[int, BuiltTable | None]
    figures: tuple[Figure, ...]
    expected: Mapping[str, str]
    statistics: Mapping[str, Any] | None
    statistics_page: str | None
    found: tuple[Found, ...]
    protocols: Mapping[str, Mapping[str, Mapping[str, Any]]]
    examples: bool


def read_inputs(
    results: str | Path,
    *,
    experiment: Mapping[str, Any],
    protocols: Mapping[str, Mapping[str, Mapping[str, Any]]],
    expected: Mapping[str, str],
) -> PageInputs:
    """Read what the stages of an experiment left under its folder; what is missing stays out and is named on the page.

    Args:
        results: `results/<name>`.
        experiment: The experiment's file.
        protocols: What a protocol is for -> name -> content of its file.
        expected: Name of a figure -> what it shows, in the order of the page.

    Returns:
        The inputs of `finetune.report.page.page.to_html`.

    Raises:
        ValueError: If the folder is missing, a file is damaged, or the experiment lacks a key.
    """
    results = Path(results)
    lacking = [key for key in ("name", "protocol", "scale", "tasks", "stands_for", "tables") if key not in experiment]
    if lacking:
        raise ValueError(f"the experiment's file lacks {', '.join(lacking)}; see experiments/smoke.yaml.")
    found = tuple(read_found(results))
    numbers = table_numbers()
    statistics, page = (results / f"statistics.{suffix}" for suffix in ("json", "md"))
    return PageInputs(
        experiment=experiment,
        tables={number: read_table(results / "tables", number) for number in numbers},
        figures=tuple(read_figures(results / "figures", tuple(expected))),
        expected=expected,
        statistics=records.read_json(statistics) if statistics.is_file() else None,
        statistics_page=page.read_text(encoding="utf-8") if page.is_file() else None,
        found=found,
        protocols=protocols,
        examples=(results / "examples.html").is_file(),
    )
