"""Cells of scores, counts and settings: our value, the paper's, the released logs', and the verdict.

Every builder takes a place (what the paper prints there, and what stands behind it) and returns the cell.
"""

import statistics
from collections.abc import Mapping

from finetune.published import TASKS, released_hyperparameters, released_scores
from finetune.report.model import Cell, Reason
from finetune.report.paper.layouts import LLAMA_TABLE, METHODS, Place, scores_of_row
from finetune.report.tables.comparability import (
    digits_verdict,
    keys_of,
    reasons_against,
    score_verdict,
    setting_verdict,
)
from finetune.report.tables.frame import Frame, finish, missing, trained
from finetune.report.tables.judging import judged_cell
from finetune.stats import intervals, verdicts
from finetune.stats.intervals import Estimate

LOSS_MARGIN = 0.05
"""Largest difference of losses that counts as agreement: the largest deviation printed in the column, in nats."""


def build_cell(place: Place, frame: Frame) -> Cell:
    """Build a cell of any table but 3, 7 and 8."""
    return _BUILDERS[place.quantity](place, frame)


def _score(place: Place, frame: Frame) -> Cell:
    """Score of a task, or best loss: mean over seeds with Student's interval, Welch's for the verdict."""
    runs = frame.runs(place)
    logged = _logged(place, place.task)
    released = {"released": statistics.fmean(logged) if logged else None, "logs": _logs(len(logged))}
    if not runs:
        return missing(place, frame, **released)
    scores = [run.score for run in runs]
    ours = intervals.mean_interval(scores)
    reasons, verdict = reasons_against(place, frame.evidence, runs), verdicts.NOT_COMPARABLE
    if not reasons:
        margin = LOSS_MARGIN if place.quantity == "loss" else frame.margin
        verdict = score_verdict(place, [scores], [place.deviation], margin)
    seeds = f"{_plural(len(runs), 'seed')} ({', '.join(str(run.seed) for run in runs)})"
    how = f"mean of {seeds}, t interval" if ours.n > 1 else f"{seeds}, no interval"
    return trained(place, frame, verdict, ours, how, reasons, **released)


def _average(place: Place, frame: Frame) -> Cell:
    """Average over the tasks that ran, with the bootstrap's interval; comparable only over all eight of the paper."""
    by_task = {key[2]: frame.evidence.runs.get(key, ()) for key in keys_of(place, frame.evidence)}
    by_task = {task: runs for task, runs in by_task.items() if runs}
    logs = {task: _logged(place, task) for task in TASKS}
    released = {}
    if all(logs.values()):
        least = min(len(scores) for scores in logs.values())
        mean = statistics.fmean(statistics.fmean(scores) for scores in logs.values())
        released = {"released": mean, "logs": f"mean of 8 task means, {_logs(least)}"}
    if not by_task:
        return missing(place, frame, **released)
    if place.ablation and (absent := [task for task in _of_paper(frame) if task not in by_task]):
        words = f"not run on {', '.join(map(frame.evidence.experiment.labels.task, absent))}"
        return missing(place, frame, Reason("partial_average", f"{words}: its mean would mislead beside the others"))
    runs = [run for found in by_task.values() for run in found]
    ours = intervals.bootstrap([[run.score for run in found] for found in by_task.values()], seed=frame.seed)
    reasons, verdict = reasons_against(place, frame.evidence, runs), verdicts.NOT_COMPARABLE
    reasons += _partial(place, by_task)
    if not reasons:
        row, scores = scores_of_row(place), [[run.score for run in found] for found in by_task.values()]
        verdict = score_verdict(place, scores, [row[task].deviation for task in by_task], frame.margin)
    counts = sorted({len(found) for found in by_task.values()})
    per_task = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    interval = "bootstrap interval" if ours.n > 1 else "no interval"
    how = f"mean of {len(by_task)} task means, runs per task: {per_task}, {interval}"
    return trained(place, frame, verdict, ours, how, reasons, **released)


def _of_paper(frame: Frame) -> list[str]:
    """The experiment's tasks that an average is over."""
    return [task for task in frame.evidence.experiment.tasks if task in TASKS]


def _partial(place: Place, by_task: Mapping[str, object]) -> list[Reason]:
    """Name the tasks of a partial average, and the paper's mean over the same ones."""
    if len(by_task) == len(TASKS):
        return []
    row = scores_of_row(place).items()
    known = [float(one.paper) for task, one in row if task in by_task and one.paper and not one.inferred]
    missing = ", ".join(label for task, label in TASKS.items() if task not in by_task)
    same = f", the paper's mean over these is {statistics.fmean(known):.2f}" if len(known) == len(by_task) else ""
    names = ", ".join(TASKS[task] for task in by_task)
    return [Reason("partial_average", f"over {names} only (without {missing}){same}")]


def _trainable(place: Place, frame: Frame) -> Cell:
    """Trainable parameters as the records counted them: of the model, of one wrapped MLP matrix, or in percent."""
    runs, share = frame.runs(place), place.quantity == "trained_share"
    if not runs:
        return missing(place, frame)
    counts = sorted(run.share if share else _whole(getattr(run, place.quantity)) for run in runs)
    count = statistics.median_low(counts)
    reasons, verdict = reasons_against(place, frame.evidence, runs, sizes=False), verdicts.NOT_COMPARABLE
    if not reasons:
        verdict, reasons = digits_verdict(place.paper, count)
    spread = f", {counts[0]:,} to {counts[-1]:,}" if counts[0] != counts[-1] else ""
    how = f"count in {len(runs)} records{spread}"
    if share:
        how = f"{' or '.join(sorted({f'{run.trainable:,} of {run.total:,}' for run in runs}))} parameters"
    return trained(place, frame, verdict, Estimate(count, None, None, len(runs)) if share else count, how, reasons)


def _k(place: Place, frame: Frame) -> Cell:
    """Entries of one MLP matrix that a step keeps, and their share against the row's label, whichever model ran."""
    runs = frame.runs(place)
    if not runs:
        return missing(place, frame)
    counts = sorted({(run.trainable_per_layer, run.matrix) for run in runs}, key=str)
    (kept, matrix), several = counts[0], len(counts) > 1
    share = 100 * kept / matrix if matrix and not several else None
    verdict, reasons = digits_verdict(place.row.split()[0], share, "the label says")
    if several:
        reasons = [Reason("records_disagree", f"records hold {', '.join(f'{k:,} of {m}' for k, m in counts)}")]
    elif share is None:
        reasons = [Reason("no_architecture", "the records do not tell the size of a matrix")]
    of = f", {share:.3f} % of {matrix:,} entries" if share is not None else ""
    return trained(place, frame, verdict, _whole(kept), f"count in {_plural(len(runs), 'record')}{of}", reasons)


def _architecture(place: Place, frame: Frame) -> Cell:
    """Count or share of a part of one of the paper's models, from its architecture alone."""
    if place.model not in frame.evidence.models:
        return missing(place, frame, Reason("no_configuration", f"no configuration of {place.model} was given"))
    if place.table == LLAMA_TABLE:
        value = frame.readings[place.part][place.method]
    else:
        counts = frame.counts[place.model]
        value = counts.share(place.part) if place.quantity == "share" else getattr(counts, place.part)
    verdict, reasons = digits_verdict(place.paper, value)
    reasons += [] if place.paper else [Reason("not_printed", "the paper prints no value")]
    fields = {"model": place.model, "records": (f"conf/model/{place.model}.yaml",)}
    return finish(place, "", verdict, value, "exact count of the architecture", reasons, **fields)


def _setting(place: Place, frame: Frame) -> Cell:
    """Best batch size or learning rate of the search."""
    known = place.task in TASKS and released_hyperparameters(place.model, place.method, place.task)
    parse = int if place.quantity == "batch_size" else float
    released = {"released": parse(known[place.quantity]), "logs": known["note"]} if known else {}
    keys = keys_of(place, frame.evidence)
    search = frame.evidence.searches.get(keys[0]) if keys else None
    if search is None:
        return missing(place, frame, **released)
    value = getattr(search, place.quantity)
    states = ", ".join(f"{count} {state}" for state, count in search.states.items())
    trials = f"{_plural(sum(search.states.values()), 'trial')} ({states})"
    how, reasons, verdict = "", [Reason("no_value", f"none of {trials} has a value")], verdicts.NOT_RUN
    if value is not None:
        how, reasons = f"best of {trials}", reasons_against(place, frame.evidence, [search])
        verdict = verdicts.NOT_COMPARABLE if reasons else setting_verdict(place, value)
        value = Estimate(value, None, None, search.states.get("complete", 0))
    fields = {"model": search.model, "records": (search.path,)} | released
    return finish(place, frame.evidence.experiment.protocol, verdict, value, how, reasons, **fields)


_BUILDERS = {
    "count": _architecture,
    "share": _architecture,
    "trainable": _trainable,
    "trainable_per_layer": _trainable,
    "trained_share": _trainable,
    "k": _k,
    "average": _average,
    "score": _score,
    "loss": _score,
    "judged": judged_cell,
    "batch_size": _setting,
    "learning_rate": _setting,
}


def _logged(place: Place, task: str) -> list[float]:
    """The authors' logged scores; they have none of a variant, of a task that is not GLUE's, or of a decoder."""
    known = place.method in METHODS.values() and task in TASKS
    return list(released_scores(place.model, place.method, task).values()) if known else []


def _logs(seeds: int) -> str:
    return f"authors' logs, {_plural(seeds, 'seed')}, without the search's"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _whole(count: float) -> float:
    """A count as an int where it is one."""
    return int(count) if float(count).is_integer() else count
