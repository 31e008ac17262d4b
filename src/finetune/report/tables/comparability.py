"""Whether a cell of ours may be compared with the printed one, what the comparison says, and why not."""

import statistics
from collections.abc import Mapping, Sequence

from finetune.published import TASKS
from finetune.report.evidence.evidence import Evidence, Key, Run, Search
from finetune.report.paper import layouts, printed
from finetune.report.paper.layouts import Cell
from finetune.stats import intervals as stats
from finetune.stats import verdicts

PAPER_PROTOCOLS = ("printed", "released")
"""Protocols whose scores may be compared with the printed ones; `sound` makes other choices than the paper."""


def keys_of(cell: Cell, evidence: Evidence) -> list[Key]:
    """List the (model, method, task) whose runs a cell is made of; none where no model stands for the paper's."""
    model = evidence.stands_for.get(cell.model)
    tasks = [cell.task] if cell.task else [*TASKS]
    return [(model, cell.method, task) for task in tasks] if model and cell.method else []


def reasons_against(cell: Cell, evidence: Evidence, runs: Sequence[Run | Search], *, sizes: bool = True) -> list[str]:
    """Say why a cell may not be compared with the paper.

    Args:
        cell: The cell.
        evidence: Where its runs come from.
        runs: The finished runs, or the search, behind the cell; at least one.
        sizes: Whether the value depends on scale, weights and metric. A parameter count does not.

    Returns:
        At most one sentence for `source`; empty if the cell may be compared.
    """
    reasons = [] if cell.paper else ["the paper prints no value"]
    reasons += ["its value is inferred, not printed"] if cell.inferred else []
    if runs[0].model != cell.model:
        reasons.append(f"{runs[0].model} is not the paper's {cell.model}")
    if evidence.protocol not in PAPER_PROTOCOLS:
        reasons.append(f"protocol {evidence.protocol} is not the paper's")
    if sizes:
        scales = sorted({run.scale for run in runs} - {"paper"})
        reasons += [f"scale {', '.join(scales)} is not the paper's"] if scales else []
        trained = [run for run in runs if isinstance(run, Run)]
        reasons += ["the model started from random weights"] if any(run.random_weights for run in trained) else []
        other = [run for run in trained if run.metric != layouts.METRICS[run.task]]
        metrics = dict.fromkeys(f"metric {run.metric} is not {layouts.METRICS[run.task]}" for run in other)
        reasons += metrics
    return [f"not comparable: {', '.join(reasons)}"] if reasons else []


def missing_tasks(cell: Cell, by_task: Mapping[str, Sequence[Run]]) -> list[str]:
    """Name the tasks of a partial average and the paper's mean over the same ones; empty over all eight."""
    if len(by_task) == len(TASKS):
        return []
    scores = layouts.printed_scores(cell)
    known = [scores[task] for task in by_task if task in scores]
    missing = ", ".join(label for task, label in TASKS.items() if task not in by_task)
    names = ", ".join(TASKS[task] for task in by_task)
    same = f"the paper's mean over these is {statistics.fmean(known):.2f}" if len(known) == len(by_task) else ""
    same = same or "of which the paper does not print all"
    return [f"not comparable: over {names} only (without {missing}), {same}"]


def why_not_run(cell: Cell, evidence: Evidence) -> list[str]:
    """Say why a cell has no value: nothing stands for the model, no run finished, or the runs failed."""
    model = evidence.stands_for.get(cell.model)
    if not model:
        return [f"no model ran in {cell.model}'s place"]
    if cell.quantity in layouts.SETTINGS:
        return [f"no search of {model} ({cell.method})"]
    failed = [path for key in keys_of(cell, evidence) for path in evidence.failed.get(key, ())]
    lost = f", failed runs: {len(failed)} ({', '.join(failed)})" if failed else ""
    return [f"no finished run of {model} ({cell.method}){lost}"]


def score_verdict(
    cell: Cell, scores: Sequence[Sequence[float]], tasks: Sequence[str], *, comparable: bool, margin: float
) -> str:
    """Compare a score, or an average, with the print (`stats.verdict`).

    Args:
        cell: The cell.
        scores: Our scores in percent, one sequence per task.
        tasks: The tasks, in the same order.
        comparable: Whether the cell may be compared.
        margin: Largest difference that counts as agreement, in points.

    Returns:
        The verdict. The paper prints no deviation for an average: those of its tasks take its place.
    """
    paper = printed.parse(cell.paper)
    if not comparable or paper is None:
        return stats.verdict(None, comparable=False, rounding=0, margin=margin)
    deviations = layouts.printed_stds(cell)
    stds = [deviations[task] for task in tasks]
    difference = stats.difference_from_paper(scores, paper.value, stds, layouts.PAPER_RUNS[cell.model])
    return stats.verdict(difference, rounding=paper.rounding, margin=margin)


def count_verdict(cell: Cell, exact: float, *, comparable: bool) -> tuple[str, list[str]]:
    """Compare an exact count or share with the print.

    Args:
        cell: The cell.
        exact: The count, or the share in percent.
        comparable: Whether the cell may be compared.

    Returns:
        The verdict, and at most one mark for `source` where the paper prints other digits than the count rounds to.
    """
    paper = printed.parse(cell.paper)
    if not comparable or paper is None:
        return verdicts.NOT_COMPARABLE, []
    if paper.round(exact).number == paper.number:
        return verdicts.AGREES, []
    how = "cut off, not rounded" if paper.truncate(exact).number == paper.number else "neither rounded nor cut off"
    value = f"{exact:,}" if isinstance(exact, int) else f"{exact:,.2f}{paper.unit if paper.unit == '%' else ''}"
    return verdicts.DIFFERS, [f"{value} rounds to {paper.round(exact).text}, the paper prints {paper.text} ({how})"]


def k_verdict(cell: Cell, share: float | None) -> tuple[str, list[str]]:
    """Compare the share of entries that a run keeps with its row's label; it is the one number printed of k.

    Args:
        cell: A cell of column `layouts.K`; its row label starts with the printed share in percent.
        share: Kept entries of a matrix in percent; `None` where the records do not tell.

    Returns:
        The verdict, and at most one mark for `source` where the label is not the share rounded.
    """
    label = printed.parse(cell.row.split()[0])
    if share is None or label is None:
        return verdicts.NOT_COMPARABLE, []
    if label.round(share).number == label.number:
        return verdicts.AGREES, []
    how = "cut off, not rounded" if label.truncate(share).number == label.number else "neither rounded nor cut off"
    return verdicts.DIFFERS, [f"{share:.3f} % rounds to {label.round(share).text}, the label says {label.text} ({how})"]


def setting_verdict(cell: Cell, value: float, *, comparable: bool) -> str:
    """Compare a batch size (equal) or a learning rate (within a factor of 2) with the print."""
    paper = printed.parse(cell.paper)
    if not comparable or paper is None:
        return verdicts.NOT_COMPARABLE
    same = value == paper.value if cell.quantity == "batch_size" else stats.within_factor(value, paper.value)
    return verdicts.AGREES if same else verdicts.DIFFERS
