"""The report: one page that works without a network, from what an experiment's stages left.

Findings and plots come first, then every table with the paper's and the logs' numbers, then what is behind them:
protocol, differences between paper and code, what was not run, environment, cost. The same inputs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from finetune.published import discrepancies
from finetune.report.figures.table_panels import table_panels
from finetune.report.page import protocol, records
from finetune.report.page.blocks import Block, Items, Paragraph
from finetune.report.page.equivalence import equivalence_blocks
from finetune.report.page.findings import findings
from finetune.report.page.inputs import PageInputs
from finetune.report.page.missing import missing, why_no_table
from finetune.report.page.render import render
from finetune.report.page.scores import statistics_blocks
from finetune.report.page.tables import anchor_of, heading_of, layout
from finetune.report.paper.layouts import PAPER_MODELS
from finetune.stats import verdicts


class Section(NamedTuple):
    """A part of the page that is blocks alone."""

    id: str
    title: str
    blocks: Sequence[Block]


def to_html(inputs: PageInputs) -> str:
    """Render the page of what `finetune.report.page.inputs.read_inputs` read: a whole HTML document.

    Raises:
        ValueError: If the experiment's protocol has no file.
    """
    return render("report.html.j2", **page_context(inputs))


def page_context(inputs: PageInputs) -> dict[str, Any]:
    """All that the template shows, as data."""
    experiment = inputs.experiment
    built = {name: table for name, table in inputs.tables.items() if table is not None}
    drawn = [figure.name for figure in inputs.figures]
    charts = [(heading_of(name), table, table_panels(table, inputs.labels)) for name, table in built.items()]
    environment = records.environment(inputs) or [_none("Not run: there is no record.")]
    cost = [
        records.time_grid(inputs) or _none("Time: no record says how long it took."),
        records.memory_grid(inputs) or _none("Memory: no record of a training run."),
        records.hosvd_grid(inputs) or _none("Cost of the HOSVD: not run."),
    ]
    return {
        "experiment": experiment["name"],
        "protocol": experiment["protocol"],
        "facts": _facts(inputs),
        "places": [
            f"{PAPER_MODELS[paper]}: {model if model != paper else 'the paper’s own'}"
            for paper, model in experiment["stands_for"].items()
            if model
        ],
        "findings": list(findings(inputs)),
        "statistics": inputs.statistics is not None,
        "charts": [chart for chart in charts if chart[2]],
        "figures": [(figure, protocol.bearing(figure.name)) for figure in inputs.figures],
        "undrawn": [f"{name} ({what})" for name, what in inputs.expected.items() if name not in drawn],
        "tables": [
            (name, table, layout(table) if table else why_no_table(inputs, name), protocol.bearing(name))
            for name, table in inputs.tables.items()
        ],
        "before": [Section("statistics", "Statistics", _statistics(inputs)), _protocol(inputs)],
        "differences": discrepancies(),
        "anchors": [anchor_of(name) for name in (*inputs.tables, *drawn)],
        "after": [
            Section("missing", "What was not run", [Items([*missing(inputs)])]),
            Section("environment", "Environment", environment),
            Section("cost", "Cost", cost),
        ],
        "examples": inputs.examples,
    }


def _facts(inputs: PageInputs) -> dict[str, Any]:
    built = [table for table in inputs.tables.values() if table is not None]
    cells = [cell for table in built for cell in table.cells]
    return {
        "Protocol": inputs.experiment["protocol"],
        "Scale": inputs.experiment["scale"],
        "Tables": f"{len(built)} of {len(inputs.tables)}",
        "Cells with a value": f"{sum(cell.verdict != verdicts.NOT_RUN for cell in cells)} of {len(cells)}",
        "Finished records": sum(one.content.get("status", "finished") == "finished" for one in inputs.found),
    }


def _none(text: str) -> Paragraph:
    return Paragraph(text, "none")


def _statistics(inputs: PageInputs) -> list[Block]:
    if inputs.statistics is not None:
        made = statistics_blocks, equivalence_blocks
        return [block for blocks in made for block in blocks(inputs.statistics, inputs.labels)]
    return [_none(f"Not run: results/{inputs.experiment['name']}/statistics.json is missing.")]


def _protocol(inputs: PageInputs) -> Section:
    used, scale = inputs.experiment["protocol"], inputs.experiment["scale"]
    words = (
        f"Protocol {used}: every choice with its source, beside the other protocols’. The scale {scale} may shorten "
        "runs and lower precision; what was really used is under “As run”, from the records."
    )
    grids = [protocol.choices_grid(title, used, found) for title, found in inputs.protocols.items()]
    run = [*protocol.as_run(inputs)] or [_none("As run: no training record.")]
    return Section("protocol", "Protocol", [Paragraph(words), *grids, *run])
