"""How runs went: score at the best, at the last and at the early-stopped evaluation, and how many collapsed.

A run has collapsed if it scores no better than a constant prediction: that of the most frequent class, or of one value.
From predictions, on the rows that its score is of: accuracy up to the share of the largest class; Matthews or Pearson
correlation up to 0. Without predictions accuracy's is told by F1: 0 if no row was put into class 1, 2 a / (1 + a) if
every row was; where F1 is not measured either it is not known. A decoder has no constant prediction. A run that failed
because loss or gradient was not finite has diverged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.report.evidence.evidence import Evidence
from finetune.report.evidence.run import Evaluation, Run
from finetune.report.statistics.families import Design
from finetune.stats.intervals import Estimate, mean_interval
from finetune.store.checks import LOWER_IS_BETTER

PREDICTIONS, SCORES = "predictions", "scores"
"""What says whether runs collapsed."""


@dataclass(frozen=True)
class Course:
    """The runs of one method on one task.

    Attributes:
        runs: Finished and diverged ones.
        best: Mean over seeds of the score at the best evaluation, with a t interval; `None` if all diverged.
        last: At the last evaluation.
        stopped: At the best evaluation before the first `patience` ones in a row without a better score.
        collapsed: Number of finished runs that collapsed; `None` where it is not known.
        by: `PREDICTIONS` if all finished runs hold them, else `SCORES`.
    """

    method: str
    task: str
    runs: int
    best: Estimate | None
    last: Estimate | None
    stopped: Estimate | None
    collapsed: int | None
    diverged: int
    by: str

    @property
    def share(self) -> float | None:
        """Share of the runs that collapsed or diverged."""
        return None if self.collapsed is None else (self.collapsed + self.diverged) / self.runs


def courses(evidence: Evidence, model: str, design: Design) -> Iterator[Course]:
    """Every method and task of a model, tasks in the order of columns."""
    keys = [key for key in {**evidence.runs, **evidence.failed} if key[0] == model]
    for task in design.labels.in_order({task for _, _, task in keys}):
        for method in dict.fromkeys(method for _, method, name in keys if name == task):
            runs = evidence.runs.get((model, method, task), ())
            lost = sum(path in evidence.diverged for path in evidence.failed.get((model, method, task), ()))
            if runs or lost:
                yield _course(method, task, runs, lost, design.patience)


def _course(method: str, task: str, runs: Sequence[Run], lost: int, patience: int) -> Course:
    told = [run for run in runs if run.evaluations]
    lower = any(run.metric in LOWER_IS_BETTER for run in runs)
    stopped = [early_stopped(run.evaluations, patience, lower_is_better=lower).reported for run in told]
    last = [run.evaluations[-1].reported for run in told]
    found = [collapsed(run) for run in runs]
    known = [one for one in found if one is not None]
    return Course(
        method,
        task,
        len(runs) + lost,
        mean_interval([run.score for run in runs]) if runs else None,
        mean_interval(last) if told else None,
        mean_interval(stopped) if told else None,
        sum(known) if len(known) == len(found) else None,
        lost,
        PREDICTIONS if all(run.packed is not None for run in runs) else SCORES,
    )


def early_stopped(evaluations: Sequence[Evaluation], patience: int, *, lower_is_better: bool = False) -> Evaluation:
    """The evaluation that early stopping would have kept.

    Args:
        evaluations: At least one, in their order.
        patience: Evaluations in a row without a better selecting score, after which a run ends.
        lower_is_better: Whether a smaller score is the better one.
    """
    best, stale = evaluations[0], 0
    for one in evaluations[1:]:
        if (one.selecting < best.selecting) if lower_is_better else (one.selecting > best.selecting):
            best, stale = one, 0
        else:
            stale += 1
            if stale >= patience:
                break
    return best


def collapsed(run: Run) -> bool | None:
    """Whether a finished run scores no better than a constant prediction; `None` where its record does not tell."""
    if run.metric in LOWER_IS_BETTER:
        return False
    if run.metric != "accuracy":
        return run.score <= 0
    if run.predictions is not None:
        _, counts = np.unique(run.predictions.labels, return_counts=True)
        return bool(run.score <= 100 * counts.max() / counts.sum() + 1e-9)
    f1 = next((one.f1 for one in run.evaluations if one.reported == run.score), None)
    if f1 is None:
        return None
    return f1 == 0 or (run.score < 100 and abs(f1 - 200 * run.score / (100 + run.score)) < 1e-6)
