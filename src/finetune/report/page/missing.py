"""What was not run, and why: every gap of the page in one place."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.published import TASKS
from finetune.report.page.inputs import PageInputs
from finetune.report.page.tables import heading_of
from finetune.report.paper.layouts import PAPER_MODELS
from finetune.stats import verdicts


def missing(inputs: PageInputs) -> Iterator[str]:
    """A sentence for each gap: models, tasks, tables, cells, figures, statistics, examples, failures."""
    yield from _models(inputs)
    yield "Table 2: formulas, no numbers; the tests of the layers compare them in float64."
    for name, table in inputs.tables.items():
        if table is None:
            yield why_no_table(inputs, name)
        elif count := sum(cell.verdict == verdicts.NOT_RUN for cell in table.cells):
            yield f"{heading_of(name)}: {count} of {len(table.cells)} cells not run; the reasons stand under it."
    yield from _others(inputs)
    for one in inputs.found:
        if one.content.get("status") == "failed":
            yield f"{one.path}: failed ({str(one.content.get('error') or 'no error kept')[:200]})"


def why_no_table(inputs: PageInputs, name: str) -> str:
    """Say why a table of the paper is not on the page."""
    experiment, table = inputs.experiment["name"], heading_of(name)
    if int(name.removeprefix("table_")) not in inputs.experiment["tables"]:
        absent = [title for model, title in PAPER_MODELS.items() if not inputs.experiment["stands_for"].get(model)]
        places = f"; nothing runs in the place of {', '.join(absent)}" if absent else ""
        return f"{table}: not run; experiment {experiment} leaves it out{places}."
    return f"{table}: not run; results/{experiment}/tables/{name}.json is missing: dvc repro tables@{experiment}."


def _models(inputs: PageInputs) -> Iterator[str]:
    experiment = inputs.experiment
    for model, title in PAPER_MODELS.items():
        other = experiment["stands_for"].get(model)
        if not other:
            yield f"{title}: not run; no model of experiment {experiment['name']} stands in its place."
        elif other != model:
            yield f"{title} itself: not run; {other} runs in its place, so no score reproduces a printed one."
    if tasks := [title for task, title in TASKS.items() if task not in experiment["tasks"]]:
        yield f"GLUE tasks not run: {', '.join(tasks)}; experiment {experiment['name']} does not list them."


def _others(inputs: PageInputs) -> Iterator[str]:
    folder, drawn = f"results/{inputs.experiment['name']}", {figure.name for figure in inputs.figures}
    for figure, what in inputs.expected.items():
        if figure not in drawn:
            yield f"Figure '{figure}' ({what}): not run; {folder}/figures/{figure}.json is missing."
    if inputs.statistics is None:
        yield f"Statistics: not run; {folder}/statistics.json is missing."
    if not inputs.examples:
        yield f"Answers side by side (Appendix E): not run; {folder}/examples.html is missing."
    if not all(one.content["judge"]["measures_quality"] for one in inputs.of_kind("judgments")):
        yield "Judged quality of answers: not run; the local judge's scores are no measure of quality."
    trained = {one.run["method"] for one in inputs.of_kind("train")}
    if absent := [inputs.labels.method(one) for one in inputs.experiment.get("methods", ()) if one not in trained]:
        yield f"GLUE training of {', '.join(absent)}: not run; there is no record."
