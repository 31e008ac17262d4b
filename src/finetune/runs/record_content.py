"""What a record says of a run; :mod:`finetune.store.records` says how it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.data.examples import Examples
from finetune.store import records
from finetune.training.loop import Progress, median_step_seconds
from finetune.training.options import TrainingOptions, planned_steps


def header(
    config: Mapping[str, Any],
    fingerprint: str,
    splits: Mapping[str, Examples],
    score_split: str,
    task: str,
    seed: int,
    hyperparameters: Mapping[str, Any],
    kind: str,
    digest: str,
) -> dict[str, Any]:
    """Who ran what, on which model and data, with which code."""
    model = config["model"]
    return {
        "schema": records.SCHEMA,
        "version": config["version"],
        "status": "finished",
        "error": None,
        "run": {
            "experiment": config["name"],
            "kind": kind,
            "model": model["name"],
            "method": config["method"]["name"],
            "task": task,
            "seed": seed,
            "protocol": config["protocol"]["name"],
            "scale": config["scale"]["name"],
            "config_hash": digest,
        },
        "hyperparameters": dict(hyperparameters),
        "model": {
            "title": model["title"],
            "checkpoint": model["checkpoint"],
            "revision": model["revision"],
            "sha256": fingerprint,
            "random_weights": model["random_weights"],
        },
        "data": {
            "task": task,
            "sha256": {role: split.sha256 for role, split in splits.items()},
            "rows": {role: len(split) for role, split in splits.items()},
            "score_split": score_split,
        },
        "config": {key: config[key] for key in ("model", "method", "protocol", "scale")},
        "provenance": records.provenance(),
    }


def treatment(options: TrainingOptions, config: Mapping[str, Any], matrices: int) -> dict[str, Any]:
    """What all methods must share, printed in the record."""
    return {
        "padding": config["protocol"]["padding"],
        "precision": options.precision,
        "optimizer": "AdamW",
        "target_matrices": matrices,
        "train": config["protocol"]["train"],
        "search_trials": config["scale"]["search"]["trials"],
        "max_steps": options.max_steps,
        "evaluation_steps": options.evaluation_steps,
    }


def outcome(progress: Progress, metric: str, options: TrainingOptions, examples: int) -> dict[str, Any]:
    """Score, steps, times, memory and evaluations of a finished run."""
    return {
        "metric": metric,
        "score": progress.score,
        "training": {
            "steps": progress.step,
            "planned_steps": planned_steps(examples, options),
            "epochs": progress.step * options.batch_size / examples,
            "best_step": progress.best_step,
            "stopped": progress.stopped,
            "resumed": progress.resumed,
            "seconds": progress.seconds,
            "step_seconds_median": median_step_seconds(progress),
        },
        "memory": progress.memory,
        "evaluations": progress.evaluations,
    }
