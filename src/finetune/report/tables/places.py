"""Which cells a table has: the printed ones, then those of the experiment's methods, ablations, tasks and decoders."""

from collections.abc import Iterator
from dataclasses import replace

from finetune.published import TASKS
from finetune.report.evidence.evidence import Evidence
from finetune.report.evidence.experiment import Experiment
from finetune.report.paper.layouts import GLUE_TABLES, K_TABLES, LLAMA_TABLE, SEARCH_TABLES, Place, printed_places

OWN_LABELS = {
    "folded": "SparseGrad, folded",
    "folded_backward": "SparseGrad, folded layer by layer",
    **{f"folded_{name}": f"SparseGrad, folded, rotated in {name}" for name in ("float32", "tf32", "bf16")},
    "truncated": "SparseGrad, truncated",
    "truncated_input": "SparseGrad, truncated (inputs)",
}
"""Variant of the efficiency stage -> row label, where it is not the method's own."""


def score_places(number: int, evidence: Evidence) -> list[Place]:
    """The cells of a table of scores, counts or settings, row by row.

    Rows are the printed ones, then the methods and ablations of the experiment that the paper lacks (tables 4 to 6, 9
    and 10); a task that the paper lacks has its column, or its row of settings, after the paper's. Table 6 has a block
    of rows for every further decoder.
    """
    experiment = evidence.experiment
    printed = [replace(one, own=experiment.stands_for.get(one.model) or "") for one in printed_places(number)]
    if number in (5, LLAMA_TABLE, *GLUE_TABLES.values()):
        printed += _other_methods(printed, evidence)
    extra = {task: experiment.labels.task(task) for task in experiment.tasks if task not in TASKS}
    if number in (*GLUE_TABLES.values(), *K_TABLES):
        rows = {one.row: one for one in printed}.values()
        printed += [_bare(row, column=title, quantity="score", task=t) for row in rows for t, title in extra.items()]
    if number in SEARCH_TABLES:
        columns = {one.column: one for one in printed}.values()
        printed += [_bare(column, row=title, task=task) for task, title in extra.items() for column in columns]
    if number == LLAMA_TABLE:
        first = printed
        for model in evidence.decoders[1 if experiment.stands_for.get("llama2_7b") else 0 :]:
            printed = [*printed, *_of_decoder(model, first, evidence)]
    return row_by_row(printed)


def efficiency_places(number: int, variants: list[str], tasks: list[str], experiment: Experiment) -> list[Place]:
    """The cells of table 3, 7 or 8: printed rows, then the records' variants and tasks, every row over full's."""
    own = next(iter(experiment.efficiency_models), "")
    found = [replace(one, own=own) for one in printed_places(number)]
    columns = list({one.column: one for one in found}.values())
    if number != 3:
        new = {task: experiment.labels.task(task) for task in tasks if task not in TASKS}
        columns += [_bare(columns[0], column=title, task=task) for task, title in new.items()]
    labels = {one.row: one.method for one in found}
    labels |= {OWN_LABELS.get(v, experiment.labels.method(v)): v for v in variants if v not in labels.values()}
    there = {(one.row, one.column): one for one in found}
    found = [
        there.get((row, like.column), _bare(like, row=row, method=variant))
        for row, variant in labels.items()
        for like in columns
    ]
    last = list({one.row: one for one in found}.values())
    if number == 3:
        found += [_bare(one, column="Peak in training, MB", quantity="training") for one in last]
    found += _over_full(found)
    if number == 3:
        found += [_bare(one, column="Score", quantity="average") for one in last]
    if number == 8:
        found += [_bare(one, row=f"{one.row}, peak in training", quantity="training") for one in found]
    return row_by_row(found)


def _other_methods(printed: list[Place], evidence: Evidence) -> Iterator[Place]:
    """Rows of the methods that the paper lacks, on the experiment's tasks; of ablations on the models that run them.

    Answers of ablations are not judged: where none were, they have no such cell.
    """
    experiment, known = evidence.experiment, {one.method for one in printed}
    columns = [one for one in {one.column: one for one in printed}.values() if one.task in ("", *experiment.tasks)]
    for method in experiment.named:
        ablation = method not in experiment.methods
        for like in columns if method not in known else ():
            absent = method not in experiment.ablations.get(like.own, ())
            unjudged = like.quantity == "judged" and (like.own, method) not in evidence.judged
            if not ablation or not (absent or unjudged):
                label = experiment.labels.method(method)
                yield _bare(like, row=label, method=method, ablation=ablation)


def _of_decoder(model: str, first: list[Place], evidence: Evidence) -> Iterator[Place]:
    """The block of a decoder that stands in nobody's place."""
    title = evidence.models.get(model, {}).get("title", model)
    printed = [replace(one, own=model) for one in first if not one.ablation]
    for one in (*printed, *_other_methods(printed, evidence)):
        yield _bare(one, row=f"{one.row}, {title}", own=model)


def _bare(like: Place, **changes) -> Place:
    """The same cell elsewhere, where the paper prints nothing."""
    return replace(like, **{"paper": "", "paper_std": "", "source": "", "note": ""} | changes)


def _over_full(found: list[Place]) -> list[Place]:
    """Every row but full fine-tuning's, divided by it; the paper's are quotients of two printed values."""
    full = {one.column: one for one in found if one.method == "full"}
    ratios = []
    for one in (one for one in found if one.method != "full"):
        below = full[one.column]
        ratio = _bare(one, row=f"{one.row} / {below.row}", over_full=True)
        if one.paper:
            source = f"{one.source}, {one.paper} / {below.paper}"
            ratio = replace(ratio, paper=f"{float(one.paper) / float(below.paper):.2f}", source=source)
        ratios.append(ratio)
    return ratios


def row_by_row(places: list[Place]) -> list[Place]:
    """Sort cells by row and column, each in the order of first appearance."""
    rows, columns = ([*dict.fromkeys(getattr(one, name) for one in places)] for name in ("row", "column"))
    return sorted(places, key=lambda one: (rows.index(one.row), columns.index(one.column)))
