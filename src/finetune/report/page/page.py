"""The report: one page that works without a network, from what an experiment's stages left.

Findings and plots come first, then every table with the paper's and the logs' numbers, then what is behind them:
protocol, differences between paper and code, what was not run, environment, cost. The same inputs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

from finetune.report.page.markup import Child, Html, join, tag
from finetune.report.page.page_charts import CHARTED, chart_html
from finetune.report.page.page_cost import cost_html, hosvd_html, memory_html
from finetune.report.page.page_figures import anchor, figure_html
from finetune.report.page.page_findings import findings_html
from finetune.report.page.page_inputs import PageInputs
from finetune.report.page.page_markdown import headings, markdown_html
from finetune.report.page.page_missing import missing_html, why_no_table
from finetune.report.page.page_protocol import bearing_html, discrepancies_html, protocol_html, treatment_html
from finetune.report.page.page_records import environment_html
from finetune.report.page.page_tables import legend, table_html
from finetune.report.paper.layouts import PAPER_MODELS
from finetune.stats import verdicts

PAPER = "https://arxiv.org/abs/2410.07383"


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: Where links lead.
        title: Its heading.
        body: Its content.
        parts: (id, title) of what the table of contents lists below it.
    """

    id: str
    title: str
    body: Html
    parts: tuple[tuple[str, str], ...] = ()


def to_html(inputs: PageInputs) -> str:
    """Render the page.

    Args:
        inputs: What `finetune.report.page.page_inputs.read_inputs` read.

    Returns:
        A whole HTML document.

    Raises:
        ValueError: If the experiment's protocol has no file.
    """
    name = inputs.experiment["name"]
    sections = [build(inputs) for build in _SECTIONS]
    main = tag("main", "\n", _header(inputs), "\n", *(join([_section(one), "\n"]) for one in sections))
    body = join([tag("a", "Skip to the content", href="#findings", class_="skip"), _contents(sections), main], "\n")
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return _PAGE.format(title=escape(f"SparseGrad, reproduced: {name}"), style=style, body=body)


def _header(inputs: PageInputs) -> Html:
    experiment = inputs.experiment
    built = [table for table in inputs.tables.values() if table is not None]
    rows = [row for table in built for row in table.rows]
    run = sum(row["verdict"] != verdicts.NOT_RUN for row in rows)
    finished = sum(one.content.get("status", "finished") == "finished" for one in inputs.found)
    facts = [
        ("Protocol", experiment["protocol"]),
        ("Scale", experiment["scale"]),
        ("Tables", f"{len(built)} of {len(inputs.tables)}"),
        ("Cells with a value", f"{run} of {len(rows)}"),
        ("Finished records", str(finished)),
    ]
    places = [
        f"{PAPER_MODELS[paper]}: {model if model != paper else 'the paper’s own'}"
        for paper, model in experiment["stands_for"].items()
        if model
    ]
    return tag(
        "header",
        "\n",
        tag("h1", "SparseGrad, reproduced"),
        "\n",
        tag("p", "Experiment ", tag("b", experiment["name"]), " · ", tag("a", "the paper", href=PAPER), class_="under"),
        "\n",
        tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts), class_="facts"),
        "\n",
        tag("p", "Models that ran in the place of the paper’s: ", "; ".join(places) or "none", ".", class_="lead"),
        "\n",
    )


def _findings(inputs: PageInputs) -> Section:
    return Section("findings", "Findings", findings_html(inputs))


def _plots(inputs: PageInputs) -> Section:
    charts = [chart_html(table) for number in CHARTED if (table := inputs.tables.get(number)) is not None]
    shown: list[Child] = [chart for chart in charts if chart is not None]
    for figure in inputs.figures:
        number = figure.name.removeprefix("figure_")
        shown.append(figure_html(figure, bearing_html("figures", int(number)) if number.isdigit() else None))
    drawn = {figure.name for figure in inputs.figures}
    absent = [f"{name} ({what})" for name, what in inputs.expected.items() if name not in drawn]
    if absent:
        shown.append(tag("p", f"Figures not run: {'; '.join(absent)}.", class_="none"))
    parts = tuple((anchor(figure.name), figure.title) for figure in inputs.figures)
    return Section("plots", "Plots", join(shown, "\n"), parts)


def _tables(inputs: PageInputs) -> Section:
    intro = tag(
        "p",
        "Ours with its 95 % interval and verdict, the paper’s printed value, and the authors’ released logs, below or "
        "beside each other. A line or column is left out where it would be empty throughout.",
    )
    parts, ids = [tag("div", intro, legend(), class_="intro")], []
    for number, table in inputs.tables.items():
        name = f"table-{number:02d}"
        if table is None:
            head = tag("h3", f"Table {number}", tag("small", "not run"), id=name)
            parts.append(tag("section", head, tag("p", why_no_table(inputs, number), class_="none"), class_="result"))
            ids.append((name, f"{number} · not run"))
        else:
            parts.append(table_html(table, after=bearing_html("tables", number)))
            ids.append((name, f"{number} · {table.title}"))
    return Section("tables", "Tables", join(parts, "\n"), tuple(ids))


def _statistics(inputs: PageInputs) -> Section:
    if inputs.statistics_page is None:
        words = f"Not run: results/{inputs.experiment['name']}/statistics.md is missing."
        return Section("statistics", "Statistics", tag("p", words, class_="none"))
    text = inputs.statistics_page
    return Section("statistics", "Statistics", markdown_html(text, "statistics"), tuple(headings(text, "statistics")))


def _protocol(inputs: PageInputs) -> Section:
    used, scale = inputs.experiment["protocol"], inputs.experiment["scale"]
    words = (
        f"Protocol {used}: every choice with its source, beside the other protocols’. The scale {scale} may shorten "
        "runs and lower precision; what was really used is under “As run”, from the records."
    )
    grids = [protocol_html(title, used, found) for title, found in inputs.protocols.items()]
    run = treatment_html(one.content for one in inputs.found) or tag("p", "As run: no training record.", class_="none")
    return Section("protocol", "Protocol", join([tag("p", words), *grids, run], "\n"))


def _differences(inputs: PageInputs) -> Section:
    words = (
        "Where the paper’s text and the released code say different things: what each says, which tables it bears on, "
        "and what is done here under each protocol."
    )
    drawn = {figure.name for figure in inputs.figures}
    body = join([tag("p", words), discrepancies_html(inputs.experiment["protocol"], drawn)], "\n")
    return Section("differences", "Where paper and code differ", body)


def _missing(inputs: PageInputs) -> Section:
    return Section("missing", "What was not run", missing_html(inputs))


def _environment(inputs: PageInputs) -> Section:
    body = environment_html(inputs.found) if inputs.found else tag("p", "Not run: there is no record.", class_="none")
    return Section("environment", "Environment", body)


def _cost(inputs: PageInputs) -> Section:
    parts = [
        cost_html(inputs.found) or tag("p", "Time: no record says how long it took.", class_="none"),
        memory_html(inputs.found) or tag("p", "Memory: no record of a training run.", class_="none"),
        hosvd_html(inputs.found) or tag("p", "Cost of the HOSVD: not run.", class_="none"),
    ]
    return Section("cost", "Cost", join(parts, "\n"))


def _files(inputs: PageInputs) -> Section:
    lines: list[Child] = []
    if inputs.examples:
        lines.append(join([tag("a", "Answers side by side", href="examples.html"), ", as in Appendix E of the paper"]))
    else:
        lines.append("Answers side by side (Appendix E): not run")
    if inputs.statistics is not None:
        lines.append(join([tag("a", "statistics.json", href="statistics.json"), ", all tests and intervals in full"]))
    lines.append(join([tag("a", "tables/", href="tables/"), ", every table as CSV, Markdown and LaTeX"]))
    rows = [join([tag("li", line), "\n"]) for line in lines]
    words = "Links lead to files beside this page; the page itself needs none of them."
    return Section("files", "Files beside this page", join([tag("p", words), tag("ul", "\n", *rows)], "\n"))


_SECTIONS = (
    _findings,
    _plots,
    _tables,
    _statistics,
    _protocol,
    _differences,
    _missing,
    _environment,
    _cost,
    _files,
)


def _section(section: Section) -> Html:
    head = tag("h2", section.title, id=section.id)
    return tag("section", "\n", head, "\n", section.body, "\n", aria_labelledby=section.id, class_="part")


def _contents(sections: Sequence[Section]) -> Html:
    lines = []
    for section in sections:
        below = [tag("li", tag("a", title, href=f"#{name}")) for name, title in section.parts]
        link = tag("a", section.title, href=f"#{section.id}")
        lines.append(tag("li", link, tag("ul", *below) if below else None))
    return tag("nav", tag("p", "Contents"), "\n", tag("ul", "\n", join(lines, "\n")), "\n", aria_label="Contents")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
