"""The report: one page that works without a network, from what an experiment's stages left.

Findings and plots come first, then every table with the paper's and the logs' numbers, then what is behind them:
protocol, differences between paper and code, what was not run, environment, cost. The same inputs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.report.figures.table_panels import table_panels
from finetune.report.page import protocol, records
from finetune.report.page.blocks import Block, Heading, Items, Paragraph
from finetune.report.page.findings import findings
from finetune.report.page.inputs import PageInputs
from finetune.report.page.missing import missing, why_no_table
from finetune.report.page.render import render
from finetune.report.page.scores import statistics_blocks
from finetune.report.page.tables import TableView, anchor_of, heading_of, view
from finetune.report.paper.layouts import PAPER_MODELS
from finetune.stats import verdicts


@dataclass(frozen=True)
class Section:
    """A part of the page that is blocks alone."""

    id: str
    title: str
    blocks: Sequence[Block]

    @property
    def parts(self) -> list[tuple[str, str]]:
        """(id, title) of what the contents list below it."""
        return [(block.id, block.title) for block in self.blocks if isinstance(block, Heading)]


@dataclass(frozen=True)
class Built:
    """A table of the page: its view, or why there is none, and the differences that bear on it."""

    anchor: str
    heading: str
    view: TableView | None
    why: str
    bearing: Sequence[tuple[str, str]]


def to_html(inputs: PageInputs) -> str:
    """Render the page.

    Args:
        inputs: What `finetune.report.page.inputs.read_inputs` read.

    Returns:
        A whole HTML document.

    Raises:
        ValueError: If the experiment's protocol has no file.
    """
    return render("report.html.j2", **page_context(inputs))


def page_context(inputs: PageInputs) -> dict[str, Any]:
    """All that the template shows, as data."""
    experiment = inputs.experiment
    known = [table for table in inputs.tables.values() if table is not None]
    tables = _tables(inputs)
    drawn = [figure.name for figure in inputs.figures]
    anchors = {anchor_of(name) for name in (*inputs.tables, *drawn)}
    charts = [(heading_of(table), table, table_panels(table, inputs.labels)) for table in known]
    return {
        "experiment": experiment["name"],
        "facts": _facts(inputs),
        "places": [
            f"{PAPER_MODELS[paper]}: {model if model != paper else 'the paper’s own'}"
            for paper, model in experiment["stands_for"].items()
            if model
        ],
        "findings": list(findings(inputs)),
        "statistics": inputs.statistics is not None,
        "charts": [chart for chart in charts if chart[2]],
        "figures": [(figure, _bearing("figures", figure.name)) for figure in inputs.figures],
        "undrawn": [f"{name} ({what})" for name, what in inputs.expected.items() if name not in drawn],
        "drawn": [(anchor_of(figure.name), figure.title) for figure in inputs.figures],
        "tables": tables,
        "listed": [
            (built.anchor, f"{built.heading} · {built.view.title if built.view else 'not run'}") for built in tables
        ],
        "cards": protocol.difference_cards(experiment["protocol"], anchors),
        "before": [_statistics(inputs), _protocol(inputs)],
        "after": [
            Section("missing", "What was not run", [Items(missing(inputs))]),
            _records("environment", "Environment", records.environment(inputs) or [None], ["Not run: no record."]),
            _records(
                "cost",
                "Cost",
                [records.time_grid(inputs), records.memory_grid(inputs), records.hosvd_grid(inputs)],
                [
                    "Time: no record says how long it took.",
                    "Memory: no record of a training run.",
                    "Cost of the HOSVD: not run.",
                ],
            ),
        ],
        "examples": inputs.examples,
    }


def _facts(inputs: PageInputs) -> list[tuple[str, str]]:
    built = [table for table in inputs.tables.values() if table is not None]
    cells = [cell for table in built for cell in table.cells]
    run = sum(cell.verdict != verdicts.NOT_RUN for cell in cells)
    finished = sum(one.content.get("status", "finished") == "finished" for one in inputs.found)
    return [
        ("Protocol", inputs.experiment["protocol"]),
        ("Scale", inputs.experiment["scale"]),
        ("Tables", f"{len(built)} of {len(inputs.tables)}"),
        ("Cells with a value", f"{run} of {len(cells)}"),
        ("Finished records", str(finished)),
    ]


def _tables(inputs: PageInputs) -> list[Built]:
    return [
        Built(
            anchor_of(name),
            heading_of(table) if table is not None else name.replace("_", " ").capitalize().replace(" 0", " "),
            view(table) if table is not None else None,
            "" if table is not None else why_no_table(inputs, name),
            _bearing("tables", name),
        )
        for name, table in inputs.tables.items()
    ]


def _bearing(kind: str, name: str) -> list[tuple[str, str]]:
    """The differences that bear on a table or figure of the paper."""
    number = name.removeprefix(f"{kind[:-1]}_")
    return protocol.bearing(kind, int(number)) if number.isdigit() else []


def _statistics(inputs: PageInputs) -> Section:
    if inputs.statistics is not None:
        return Section("statistics", "Statistics", list(statistics_blocks(inputs.statistics, inputs.labels)))
    words = f"Not run: results/{inputs.experiment['name']}/statistics.json is missing."
    return Section("statistics", "Statistics", [Paragraph(words, "none")])


def _protocol(inputs: PageInputs) -> Section:
    used, scale = inputs.experiment["protocol"], inputs.experiment["scale"]
    words = (
        f"Protocol {used}: every choice with its source, beside the other protocols’. The scale {scale} may shorten "
        "runs and lower precision; what was really used is under “As run”, from the records."
    )
    grids = [protocol.choices_grid(title, used, found) for title, found in inputs.protocols.items()]
    run = list(protocol.as_run(inputs)) or [Paragraph("As run: no training record.", "none")]
    return Section("protocol", "Protocol", [Paragraph(words), *grids, *run])


def _records(name: str, title: str, grids: Sequence[Block | None], instead: Sequence[str]) -> Section:
    """Grids, each with what stands in its place where there is none."""
    return Section(
        name,
        title,
        [grid or Paragraph(instead[min(place, len(instead) - 1)], "none") for place, grid in enumerate(grids)],
    )
