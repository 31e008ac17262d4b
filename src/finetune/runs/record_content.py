"""What a record says of a run; :mod:`finetune.store.records` says how it is kept."""

from __future__ import annotations

from typing import Any

from finetune.runs.problem import Problem, Run
from finetune.store import records
from finetune.training.loop import Progress, Training, median_step_seconds
from finetune.training.options import TrainingOptions, planned_steps


def header(problem: Problem, run: Run) -> dict[str, Any]:
    """Who ran what, on which model and data, with which code."""
    config, splits = problem.config, problem.splits(run.task)
    model = config["model"]
    return {
        "schema": records.SCHEMA,
        "version": config["version"],
        "status": "finished",
        "error": None,
        "run": {
            "experiment": config["name"],
            "kind": "search" if run.search else problem.kind,
            "model": model["name"],
            "method": config["method"]["name"],
            "task": run.task,
            "seed": run.seed,
            "protocol": config["protocol"]["name"],
            "scale": config["scale"]["name"],
            "config_hash": problem.digest(run),
        },
        "hyperparameters": dict(run.hyperparameters),
        "model": {name: model[name] for name in ("title", "checkpoint", "revision", "random_weights")}
        | {"sha256": problem.fingerprint},
        "data": {
            "task": run.task,
            "sha256": {role: split.sha256 for role, split in splits.items()},
            "rows": {role: len(split) for role, split in splits.items()},
        }
        | problem.data_facts(run.task),
        "config": {key: config[key] for key in ("model", "method", "protocol", "scale")},
        "provenance": records.provenance(),
    }


def treatment(problem: Problem, task: str, options: TrainingOptions, matrices: int) -> dict[str, Any]:
    """What all methods must share, printed in the record."""
    return problem.treatment(task) | {
        "precision": options.precision,
        "optimizer": "AdamW",
        "target_matrices": matrices,
        "train": problem.config["protocol"]["train"],
        "max_steps": options.max_steps,
        "evaluation_steps": options.evaluation_steps,
    }


def outcome(progress: Progress, training: Training) -> dict[str, Any]:
    """Score, steps, times, memory and evaluations of a finished run."""
    examples = len(training.split)
    return {
        "metric": training.metric,
        "score": progress.score,
        "training": {
            "steps": progress.step,
            "planned_steps": planned_steps(examples, training.options),
            "epochs": progress.step * training.options.batch_size / examples,
            "best_step": progress.best_step,
            "stopped": progress.stopped,
            "resumed": progress.resumed,
            "seconds": progress.seconds,
            "step_seconds_median": median_step_seconds(progress),
        },
        "memory": progress.memory,
        "evaluations": progress.evaluations,
    }
