"""What a record says of a run; :mod:`finetune.store.records` says how it is kept."""

from __future__ import annotations

from typing import Any

from finetune.runs.problem import Problem, Run
from finetune.store import records
from finetune.store.checks import REPORT
from finetune.training.loop import Progress, Training, median_step_seconds
from finetune.training.options import planned_steps

_OF_PROGRESS = ("best_step", "stopped", "resumed", "damaged_checkpoints", "seconds")


def named(problem: Problem, run: Run) -> dict[str, Any]:
    """What names a run: its places in the experiment, and the hash of its identity."""
    groups = {name: problem.config[name]["name"] for name in ("model", "method", "protocol", "scale")}
    own = {"experiment": problem.config["name"], "kind": "search" if run.search else problem.kind}
    return own | groups | {"task": run.task, "seed": run.seed, "config_hash": problem.digest(run)}


def header(problem: Problem, run: Run) -> dict[str, Any]:
    """Who ran what, on which model and data, with which code."""
    config, splits = problem.config, problem.splits(run.task)
    model = config["model"]
    return {
        "schema": records.SCHEMA,
        "version": config["version"],
        "status": "finished",
        "error": None,
        "run": named(problem, run),
        "identity": problem.identity(run),
        "hyperparameters": dict(run.hyperparameters),
        "model": {name: model[name] for name in ("title", "checkpoint", "revision", "random_weights")}
        | problem.contents,
        "data": {
            "task": run.task,
            "sha256": {role: split.sha256 for role, split in splits.items()},
            "content": {role: split.content for role, split in splits.items()},
            "rows": {role: len(split) for role, split in splits.items()},
        }
        | problem.data_facts(run.task),
        "config": {key: config[key] for key in ("model", "method", "protocol", "scale")},
        "provenance": records.provenance(commit=config.get("commit")),
    }


def outcome(progress: Progress, training: Training) -> dict[str, Any]:
    """Score, steps, times, memory, evaluations and predictions of a finished run.

    Where halves of the validation rows select and report, the score is the reporting half's.
    """
    examples = len(training.split)
    at_best = next(entry for entry in progress.evaluations if entry["step"] == progress.best_step)
    return {
        "metric": training.metric,
        "score": at_best.get(REPORT + training.metric, progress.score),
        "training": {
            "steps": progress.step,
            "planned_steps": planned_steps(examples, training.options),
            "epochs": progress.step * training.options.batch_size / examples,
            "step_seconds_median": median_step_seconds(progress),
            "graphs": training.options.graphs,
            "captured_steps": progress.captured,
            **{name: getattr(progress, name) for name in _OF_PROGRESS},
        },
        "memory": progress.memory,
        "evaluations": progress.evaluations,
        "predictions": progress.predictions,
    }
