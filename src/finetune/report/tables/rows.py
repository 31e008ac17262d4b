"""One row of a table's CSV per cell: our value, the paper's, the released logs', and the verdict.

Every builder takes a layout's cell and returns a dict with the keys `COLUMNS`; numbers stay numbers, `None` is "there
is none". `source` says what each value was computed from and why two of them may not be compared.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.published import TASKS, released_hyperparameters, released_scores
from finetune.report.evidence.evidence import Evidence, Run
from finetune.report.paper.architectures import ParameterCounts
from finetune.report.paper.layouts import METHODS, Cell
from finetune.report.tables.comparability import (
    count_verdict,
    k_verdict,
    keys_of,
    missing_tasks,
    reasons_against,
    score_verdict,
    setting_verdict,
    why_not_run,
)
from finetune.stats import intervals as stats
from finetune.stats import verdicts

COLUMNS = (
    "row",
    "column",
    "ours",
    "ours_low",
    "ours_high",
    "n",
    "paper",
    "paper_std",
    "released",
    "source",
    "verdict",
    "protocol",
    "model",
    "records",
)
"""Columns of the CSV: scores in percent, counts in units of one, intervals at 95 %, `n` runs (or trials)."""


@dataclass(frozen=True)
class Frame:
    """What all cells of a table share.

    Attributes:
        evidence: The runs.
        versions: Versions of the configuration among the table's runs; more than one is flagged in `source`.
        counts: Model -> parameter counts, for table 1.
        margin: Largest difference that counts as agreement, in points.
        seed: Seed of the bootstrap.
    """

    evidence: Evidence
    versions: frozenset[int]
    counts: Mapping[str, ParameterCounts]
    margin: float
    seed: int


def build_row(cell: Cell, frame: Frame) -> dict[str, Any]:
    """Build the row of one cell."""
    builders = {
        "count": _architecture_row,
        "share": _architecture_row,
        "trainable": _trainable_row,
        "trainable_per_layer": _trainable_row,
        "k": _k_row,
        "average": _average_row,
        "score": _score_row,
        "batch_size": _setting_row,
        "learning_rate": _setting_row,
    }
    return builders[cell.quantity](cell, frame)


def _score_row(cell: Cell, frame: Frame) -> dict[str, Any]:
    """Score of one task: mean over seeds with Student's interval, Welch's interval for the verdict."""
    runs = _runs(cell, frame.evidence)
    logged = _logged(cell, cell.task)
    released = {"released": statistics.fmean(logged) if logged else None, "logs": _logs(len(logged), "seed")}
    if not runs:
        return _row(cell, frame, verdict=verdicts.NOT_RUN, source=why_not_run(cell, frame.evidence), **released)
    scores = [run.score for run in runs]
    ours = stats.mean_interval(scores)
    reasons = reasons_against(cell, frame.evidence, runs)
    verdict = score_verdict(cell, [scores], [cell.task], comparable=not reasons, margin=frame.margin)
    source = [f"ours: mean of {_seeds(runs)}, t interval" if ours.n > 1 else f"ours: {_seeds(runs)}, no interval"]
    return _row(cell, frame, verdict=verdict, ours=ours, source=[*source, *reasons], runs=runs, **released)


def _average_row(cell: Cell, frame: Frame) -> dict[str, Any]:
    """Average over the tasks that ran, with the bootstrap's interval; comparable only over all eight."""
    by_task = {key[2]: frame.evidence.runs.get(key, ()) for key in keys_of(cell, frame.evidence)}
    by_task = {task: runs for task, runs in by_task.items() if runs}
    logs = {task: _logged(cell, task) for task in TASKS}
    released = {"released": None, "logs": None}
    if all(logs.values()):
        least = min(len(scores) for scores in logs.values())
        released = {"released": _mean_of_means(logs.values()), "logs": f"mean of 8 task means, {_logs(least, 'seed')}"}
    if not by_task:
        return _row(cell, frame, verdict=verdicts.NOT_RUN, source=why_not_run(cell, frame.evidence), **released)
    runs = [run for task in by_task for run in by_task[task]]
    ours = stats.bootstrap([[run.score for run in found] for found in by_task.values()], seed=frame.seed)
    reasons = [*reasons_against(cell, frame.evidence, runs), *missing_tasks(cell, by_task)]
    scores = [[run.score for run in by_task[task]] for task in by_task]
    verdict = score_verdict(cell, scores, list(by_task), comparable=not reasons, margin=frame.margin)
    counts = sorted({len(found) for found in by_task.values()})
    per_task = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    interval = "bootstrap interval" if ours.n > 1 else "no interval"
    source = [f"ours: mean of {len(by_task)} task means, runs per task: {per_task}, {interval}"]
    return _row(cell, frame, verdict=verdict, ours=ours, source=[*source, *reasons], runs=runs, **released)


def _trainable_row(cell: Cell, frame: Frame) -> dict[str, Any]:
    """Trainable parameters of the model, or of one wrapped MLP matrix, as the records counted them."""
    runs = _runs(cell, frame.evidence)
    if not runs:
        return _row(cell, frame, verdict=verdicts.NOT_RUN, source=why_not_run(cell, frame.evidence))
    counts = sorted(getattr(run, cell.quantity) for run in runs)
    count = _whole(statistics.median_low(counts))
    reasons = reasons_against(cell, frame.evidence, runs, sizes=False)
    verdict, mark = count_verdict(cell, count, comparable=not reasons)
    spread = f", {_whole(counts[0]):,} to {_whole(counts[-1]):,}" if counts[0] != counts[-1] else ""
    source = [f"ours: count in {len(runs)} records{spread}", *reasons, *mark]
    return _row(cell, frame, verdict=verdict, ours=count, source=source, runs=runs)


def _k_row(cell: Cell, frame: Frame) -> dict[str, Any]:
    """Entries of one MLP matrix that a step keeps, and their share against the row's label, whichever model ran."""
    runs = _runs(cell, frame.evidence)
    if not runs:
        return _row(cell, frame, verdict=verdicts.NOT_RUN, source=why_not_run(cell, frame.evidence))
    counts = sorted({(run.trainable_per_layer, run.matrix) for run in runs}, key=str)
    (kept, matrix), several = counts[0], len(counts) > 1
    share = 100 * kept / matrix if matrix and not several else None
    verdict, mark = k_verdict(cell, share)
    of = [f"{share:.3f} % of {matrix:,} entries"] if share is not None else []
    of += [f"records disagree: {', '.join(f'{k:,} of {m}' for k, m in counts)}"] if several else []
    source = [f"ours: count in {_plural(len(runs), 'record')}", *of, *mark]
    return _row(cell, frame, verdict=verdict, ours=_whole(kept), source=source, runs=runs)


def _architecture_row(cell: Cell, frame: Frame) -> dict[str, Any]:
    """Count or share of a part of one of the paper's models, from its architecture alone."""
    if cell.model not in frame.counts:
        source = [f"no configuration of {cell.model} was given"]
        return _row(cell, frame, verdict=verdicts.NOT_RUN, source=source)
    counts = frame.counts[cell.model]
    value = counts.share(cell.part) if cell.quantity == "share" else getattr(counts, cell.part)
    reasons = [] if cell.paper else ["not comparable: the paper prints no value"]
    verdict, mark = count_verdict(cell, value, comparable=not reasons)
    row = _row(cell, frame, verdict=verdict, ours=value, source=["ours: exact count of the architecture", *mark])
    return row | {"protocol": "", "model": cell.model, "records": frame.evidence.models[cell.model][0]}


def _setting_row(cell: Cell, frame: Frame) -> dict[str, Any]:
    """Best batch size or learning rate of the search."""
    settings = released_hyperparameters(cell.model, cell.method, cell.task)
    parse = int if cell.quantity == "batch_size" else float
    released = {"released": parse(settings[cell.quantity]), "logs": settings["note"]} if settings else {}
    keys = keys_of(cell, frame.evidence)
    search = frame.evidence.searches.get(keys[0]) if keys else None
    if search is None:
        return _row(cell, frame, verdict=verdicts.NOT_RUN, source=why_not_run(cell, frame.evidence), **released)
    value = getattr(search, cell.quantity)
    states = ", ".join(f"{count} {state}" for state, count in search.states.items())
    trials = f"{_plural(sum(search.states.values()), 'trial')} ({states})"
    if value is None:
        row = _row(cell, frame, verdict=verdicts.NOT_RUN, source=[f"none of {trials} has a value"], **released)
    else:
        reasons = reasons_against(cell, frame.evidence, [search])
        verdict = setting_verdict(cell, value, comparable=not reasons)
        source = [f"ours: best of {trials}", *reasons]
        row = _row(cell, frame, verdict=verdict, ours=value, source=source, **released)
        row["n"] = search.states.get("complete", 0)
    return row | {"records": search.path, "model": search.model}


def _row(
    cell: Cell,
    frame: Frame,
    *,
    verdict: str,
    ours: stats.Estimate | float | None = None,
    source: Iterable[str] = (),
    runs: Sequence[Run] = (),
    released: float | None = None,
    logs: str | None = None,
) -> dict[str, Any]:
    """Put a row together; `source` in the order paper, ours and its reservations, released."""
    estimate = ours if isinstance(ours, stats.Estimate) else stats.Estimate(ours, None, None, None)
    paper = [f"paper: {cell.source}{f' ({cell.note})' if cell.note else ''}"] if cell.source else [cell.note]
    failed = sum(len(frame.evidence.failed.get(key, ())) for key in keys_of(cell, frame.evidence))
    parts = [*paper, *source]
    parts += [f"{_plural(failed, 'failed run')} left out"] if failed and runs else []
    parts += _version_flag(runs, frame.versions)
    parts += [f"released: {logs}"] if released is not None else []
    return {
        "row": cell.row,
        "column": cell.column,
        "ours": estimate.mean,
        "ours_low": estimate.low,
        "ours_high": estimate.high,
        "n": estimate.n,
        "paper": cell.paper,
        "paper_std": cell.paper_std,
        "released": released,
        "source": "; ".join(parts),
        "verdict": verdict,
        "protocol": frame.evidence.protocol,
        "model": runs[0].model if runs else "",
        "records": ";".join(run.path for run in runs),
    }


def _logged(cell: Cell, task: str) -> list[float]:
    """The authors' logged scores; they have none of a variant."""
    known = cell.method in METHODS.values()
    return list(released_scores(cell.model, cell.method, task).values()) if known else []


def _runs(cell: Cell, evidence: Evidence) -> list[Run]:
    return [run for key in keys_of(cell, evidence) for run in evidence.runs.get(key, ())]


def _mean_of_means(tasks: Iterable[Sequence[float]]) -> float:
    return statistics.fmean(statistics.fmean(scores) for scores in tasks)


def _version_flag(runs: Sequence[Run], versions: frozenset[int]) -> list[str]:
    if len(versions) < 2 or not runs:
        return []
    own = ", ".join(map(str, sorted({run.version for run in runs})))
    return [f"mixed versions: this cell {own} of {', '.join(map(str, sorted(versions)))} in the table"]


def _seeds(runs: Sequence[Run]) -> str:
    return f"{_plural(len(runs), 'seed')} ({', '.join(str(run.seed) for run in runs)})"


def _logs(count: int, unit: str) -> str:
    return f"authors' logs, {_plural(count, unit)}, without the search's"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _whole(count: float) -> float:
    """A count as an int where it is one."""
    return int(count) if float(count).is_integer() else count
