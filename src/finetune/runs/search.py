"""Hyper-parameter search that survives kills: an Optuna ask/tell loop over a journal file.

The trial count is a *total*: a rerun finishes a search and repeats nothing. A trial that a kill left running is taken
up again under its number, with its point. The sampler's seed comes from the trial's number, so a resumed search draws
what an unbroken one would have drawn (a restarted sampler would repeat its first points: optuna#3255). Where the points
are as many as the trials nothing is sampled: the search is a grid, of the same number of points for each method.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from finetune.runs.search_journal import open_storage
from finetune.runs.search_space import LOSS, SearchSpace, beyond
from finetune.training.loop import Ended, NonFiniteLoss

log = logging.getLogger(__name__)
DIVERGED = "diverged"
Objective = Callable[[dict[str, Any], Callable[[int, float], None]], tuple[float, float] | float]


class Pruned(optuna.TrialPruned, Ended):
    """A trial that the pruner ends."""


def run_search(objective: Objective, space: SearchSpace, storage: BaseStorage, study_name: str) -> optuna.Study:
    """Run what is missing of a search.

    Args:
        objective: gets the hyper-parameters and a function that reports (step, score) and may prune; returns the score,
            or the score and the validation loss, which breaks ties.
        space: what to search.
        storage: of :func:`finetune.runs.search_journal.open_storage`.
        study_name: from the configuration's hash, so that another configuration is another study.

    Returns:
        The study, with ``space.trials`` finished trials, and the extensions.

    Raises:
        NonFiniteLoss: never; a diverged trial is counted and marked.
        Exception: whatever else the objective raises; as after a kill, its trial is taken up again by the next call.
    """
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        pruner = optuna.pruners.MedianPruner(space.startup_trials, space.warmup_steps)
        study = optuna.create_study(
            storage=storage, study_name=study_name, direction="maximize", load_if_exists=True, pruner=pruner
        )
        _put_back_killed(study, storage)
        _enqueue_points(study, space.points)
        while len(finished(study)) < space.trials:
            _one_trial(study, space, objective)
        while point := _next_point(study, space):
            _enqueue_points(study, [point])
            _one_trial(study, space, objective)
        return study
    finally:
        optuna.logging.set_verbosity(level)


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count towards the total: complete, pruned, diverged."""
    done = (TrialState.COMPLETE, TrialState.PRUNED)
    return [t for t in study.get_trials(deepcopy=False) if t.state in done or t.user_attrs.get(DIVERGED)]


def summary(study: optuna.Study, space: SearchSpace) -> dict[str, Any]:
    """Best point and all trials as JSON values.

    Raises:
        ValueError: if no trial completed.
    """
    best = _best(study)
    if best is None:
        raise ValueError(
            f"no trial of {len(finished(study))} completed (pruned or diverged): lower search.learning_rate."
        )
    rates, extended = _rates(study), _extended(study, space)
    return {
        "best": {**best.params, "value": best.value, "trial": best.number},
        "best_is_at_edge": len(rates) > 1 and best.params["learning_rate"] in (rates[0], rates[-1]),
        "trials": [
            {
                "number": t.number,
                "state": "diverged" if t.user_attrs.get(DIVERGED) else t.state.name.lower(),
                "value": t.value if t.state == TrialState.COMPLETE else None,
                LOSS: t.user_attrs.get(LOSS),
                **t.params,
                "seconds": t.duration.total_seconds() if t.duration else None,
                "intermediate": {str(step): value for step, value in t.intermediate_values.items()},
            }
            for t in study.trials
            if t.state.is_finished()
        ],
        "n_trials": space.trials + extended,
    } | ({"extended": extended} if space.extend else {})


def is_told_by(journal: Path, study_name: str, space: SearchSpace, record: Mapping[str, Any]) -> bool:
    """Whether a record says of a search what its journal says."""
    try:
        told = summary(optuna.load_study(study_name=study_name, storage=open_storage(journal)), space)
    except (KeyError, ValueError):  # no such study; nothing that completed
        return False
    return all(record.get(name) == value for name, value in told.items())


def _best(study: optuna.Study) -> FrozenTrial | None:
    complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
    return max(complete, key=lambda t: (t.value, -t.user_attrs.get(LOSS, 0.0), -t.number), default=None)


def _rates(study: optuna.Study) -> list[float]:
    """Learning rates that were tried, rising."""
    return sorted({trial.params["learning_rate"] for trial in finished(study)})


def _extended(study: optuna.Study, space: SearchSpace) -> int:
    return min(max(0, len(finished(study)) - space.trials), space.extend)


def _next_point(study: optuna.Study, space: SearchSpace) -> dict[str, Any] | None:
    """The next extension, or None where the search is at its end."""
    best = _best(study)
    if best is None or _extended(study, space) == space.extend:
        return None
    return beyond(best.params, _rates(study), space)


def _one_trial(study: optuna.Study, space: SearchSpace, objective: Objective) -> None:
    trial = study.ask()
    seed, startup = space.seed + trial.number, max(5, len(space.points))
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
    before = study.get_trials(deepcopy=False)[trial.number]  # what a kill left of it
    if {*before.params} == {"learning_rate"}:  # drawn already: the sampler's generator has to be past it
        study.sampler.sample_independent(study, before, "learning_rate", before.distributions["learning_rate"])
    point = {
        "learning_rate": trial.suggest_float("learning_rate", *space.learning_rate, log=True),
        "batch_size": trial.suggest_categorical("batch_size", space.batch_sizes),
    }

    def report(step: int, score: float) -> None:
        if step not in before.intermediate_values:
            trial.report(score, step)
        if trial.should_prune():
            raise Pruned

    try:
        value = objective(point, report)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        log.info("trial %d %s pruned", trial.number, point)
    except NonFiniteLoss as error:
        trial.set_user_attr(DIVERGED, True)
        study.tell(trial, state=TrialState.FAIL)
        log.info("trial %d %s diverged: %s", trial.number, point, error)
    else:
        if isinstance(value, tuple):
            value, loss = value
            trial.set_user_attr(LOSS, loss)
        study.tell(trial, value)
        log.info("trial %d %s: %.4f", trial.number, point, value)


def _put_back_killed(study: optuna.Study, storage: BaseStorage) -> None:
    """Let the trials that a kill left running wait: the next ones asked for are they, with the points they had."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get(DIVERGED):
            study.tell(trial.number, state=TrialState.FAIL)
            continue
        study_id = storage.get_study_id_from_name(study.study_name)
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
        storage.set_trial_state_values(trial_id, TrialState.WAITING)
        log.info("trial %d was killed; its point %s is tried again", trial.number, trial.params)


def _enqueue_points(study: optuna.Study, points: Sequence[Mapping[str, Any]]) -> None:
    """Queue the points that no trial has finished, and none waits for."""
    pending = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    seen = [t.params for t in finished(study)] + [t.system_attrs.get("fixed_params", t.params) for t in pending]
    for point in points:
        if dict(point) not in seen:
            study.enqueue_trial(dict(point))
