"""The least difference of two methods that an experiment's seeds and validation rows find, before anything runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.plan.experiment import Experiment
from finetune.published import TASKS, released_scores
from finetune.stats.detectable import EXAMPLE_VARIANCE, Part, least_detectable, planned_parts

_MODELS, _METHODS = ("bert_base", "roberta_base"), ("full", "lora", "sparsegrad")
"""Whose logged runs tell score and spread: five seeds each."""


def detectable_differences(experiment: Experiment, assumed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each model and task, and one for the mean over a model's tasks where there are several.

    Args:
        experiment: Gives models, tasks, seeds and rows; where one half of the rows selects, the other is scored.
        assumed: ``detectable`` of ``conf/plan.yaml``.

    Returns:
        ``least`` is in percent points of the score (losses: nats a token), None where one seed runs.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in experiment.stages["train"].values():
        if entry["model"] not in found:  # of all its methods
            found[entry["model"]] = [_of_task(experiment, entry, task, assumed) for task in entry["tasks"]]
    rows = []
    for model, tasks in found.items():
        rows += tasks
        if len(tasks) > 1:
            rows.append({"model": model, "task": None, "seeds": tasks[0]["seeds"], "least": _of_mean(tasks)})
    return [{key: value for key, value in row.items() if key != "parts"} for row in rows]


def logged(task: str) -> tuple[float, float] | None:
    """Mean score and pooled standard deviation over seeds of the authors' logged runs of base models, in percent."""
    if task not in TASKS:
        return None
    cells = [[*released_scores(model, method, task).values()] for model in _MODELS for method in _METHODS]
    cells = [cell for cell in cells if len(cell) > 1]
    freedom = sum(len(cell) - 1 for cell in cells)
    pooled = sum((len(cell) - 1) * statistics.variance(cell) for cell in cells) / freedom
    return statistics.fmean(map(statistics.fmean, cells)), pooled**0.5


def _of_task(experiment: Experiment, entry: Mapping[str, Any], task: str, assumed: Mapping[str, Any]) -> dict[str, Any]:
    config, (_, rows) = (
        experiment.problem(entry["model"], entry["method"]).config,
        experiment.rows(entry["model"], task),
    )
    metric = config["data"]["tasks"][task]["metric"] if "data" in config else "loss"
    seeds = len(entry["seeds"])
    if config["scale"].get("selection") == "half":
        rows //= 2
    measured, correlated = logged(task), assumed["correlation"]["rows"]
    if metric == "loss":  # the variance of a difference is assumed as a whole
        score, spread, variance, correlated = None, assumed[metric]["spread"], assumed[metric]["rows"] ** 2 / 2, 0.0
    else:
        score, spread = measured or (assumed[metric]["score"], assumed[metric]["spread"])
        variance = 100**2 * EXAMPLE_VARIANCE[metric](score / 100)
    seeds_part, rows_variance = planned_parts(
        spread=spread,
        seeds=seeds,
        variance=variance,
        examples=rows,
        seed_correlation=assumed["correlation"]["seeds"],
        example_correlation=correlated,
    )
    return {
        "model": entry["model"],
        "task": task,
        "metric": metric,
        "seeds": seeds,
        "rows": rows,
        "score": score,
        "spread": spread,
        "measured": measured is not None,
        "least": least_detectable([seeds_part], rows_variance),
        "parts": (seeds_part, rows_variance),
    }


def _of_mean(tasks: Sequence[Mapping[str, Any]]) -> float | None:
    squared, parts = len(tasks) ** 2, [row["parts"] for row in tasks]
    seeds = [Part(part.variance / squared, part.df) for part, _ in parts]
    return least_detectable(seeds, sum(variance for _, variance in parts) / squared)
