"""What was not run, and why: every gap of the page in one place."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.published import TASKS
from finetune.report.page.markup import Html, items
from finetune.report.page.page_inputs import PageInputs
from finetune.report.page.page_protocol import linked
from finetune.report.page.page_records import failures
from finetune.report.paper.layouts import METHODS, PAPER_MODELS
from finetune.stats import verdicts


def missing_html(inputs: PageInputs) -> Html:
    """The gaps as a list; it is never empty, since the paper's Table 2 holds formulas."""
    return items(linked(line) for line in missing(inputs))


def missing(inputs: PageInputs) -> list[str]:
    """A sentence for each gap: models, tasks, tables, cells, figures, statistics, examples, failures."""
    return [*_models(inputs), *_tables(inputs), *_others(inputs), *failures(inputs.found)]


def why_no_table(inputs: PageInputs, number: int) -> str:
    """Say why a table is not on the page."""
    name, stage = inputs.experiment["name"], f"table_{number:02d}"
    lists = inputs.experiment["tables"]
    if stage not in lists:
        return f"Table {number}: not run; experiment {name} has no stage {stage}."
    if not lists[stage]:
        absent = [title for model, title in PAPER_MODELS.items() if not inputs.experiment["stands_for"].get(model)]
        places = f"; nothing runs in the place of {', '.join(absent)}" if absent else ""
        return f"Table {number}: not run; experiment {name} leaves it out{places}."
    return f"Table {number}: not run; results/{name}/tables/{stage}.csv is missing: dvc repro {stage}@{name}."


def _models(inputs: PageInputs) -> Iterator[str]:
    experiment = inputs.experiment
    for model, title in PAPER_MODELS.items():
        other = experiment["stands_for"].get(model)
        if not other:
            yield f"{title}: not run; no model of experiment {experiment['name']} stands in its place."
        elif other != model:
            yield f"{title} itself: not run; {other} runs in its place, so no score reproduces a printed one."
    tasks = [label for task, label in TASKS.items() if task not in experiment["tasks"]]
    if tasks:
        yield f"GLUE tasks not run: {', '.join(tasks)}; experiment {experiment['name']} does not list them."


def _tables(inputs: PageInputs) -> Iterator[str]:
    yield "Table 2: formulas, no numbers; the tests of the layers compare them in float64."
    for number, table in inputs.tables.items():
        if table is None:
            yield why_no_table(inputs, number)
        elif table.count(verdicts.NOT_RUN):
            count = table.count(verdicts.NOT_RUN)
            yield f"Table {number}: {count} of {len(table.rows)} cells not run; the reasons stand under the table."


def _others(inputs: PageInputs) -> Iterator[str]:
    name = inputs.experiment["name"]
    drawn = {figure.name for figure in inputs.figures}
    for figure, what in inputs.expected.items():
        if figure not in drawn:
            yield f"Figure '{figure}' ({what}): not run; results/{name}/figures/{figure}.json is missing."
    if inputs.statistics is None:
        yield f"Statistics: not run; results/{name}/statistics.json is missing."
    if not inputs.examples:
        yield f"Answers side by side (Appendix E): not run; results/{name}/examples.html is missing."
    judges = [one.content.get("judge", {}) for one in inputs.found if one.kind == "judgments"]
    if judges and not all(judge.get("measures_quality") for judge in judges):
        yield "Judged quality of answers: not run; the local judge's scores are no measure of quality."
    trained = {one.run["method"] for one in inputs.found if one.kind == "train"}
    absent = [label for label, method in METHODS.items() if method not in trained]
    if absent:
        yield f"GLUE training of {', '.join(absent)}: not run; there is no record."
