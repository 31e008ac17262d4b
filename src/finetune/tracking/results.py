"""What searches and timings send to wandb when they are done; training runs log as they go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from finetune.tracking.tracker import (
    TRIAL_BATCH,
    TRIAL_BEST,
    TRIAL_RATE,
    TRIAL_SCORE,
    TRIAL_SECONDS,
    VARIANT_METRICS,
    Tracker,
    chosen,
)


def send_search(content: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Send a finished search: one step a trial, the best point in the summary.

    Args:
        content: of the search's file: ``run``, ``trials``, ``best``.
        settings: ``mode``, ``folder`` and ``project``, the group ``wandb`` of the configuration.
    """
    best, history = None, []
    for trial in content["trials"]:
        value = trial["value"]
        best = value if best is None or (value is not None and value > best) else best
        row = {
            TRIAL_SCORE: value,
            TRIAL_BEST: best,
            TRIAL_RATE: trial["learning_rate"],
            TRIAL_BATCH: trial["batch_size"],
            TRIAL_SECONDS: trial["seconds"],
        }
        history.append((trial["number"], {name: value for name, value in row.items() if value is not None}))
    config = chosen(content, ("run", "seed", "version", "provenance"))
    _send(
        content["run"],
        settings,
        "search",
        config,
        chosen(content, ("best", "best_is_at_edge", "n_trials", "extended")),
        history,
    )


def send_efficiency(record: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Send steps per second and peaks of every variant that was measured; see :func:`send_search`."""
    config = chosen(record, ("run", "model", "treatment", "lengths", "device", "provenance"))
    summary = {
        variant["name"]: chosen(variant, ("status", "parameters", *VARIANT_METRICS))
        | chosen(variant.get("memory", {}), VARIANT_METRICS)
        for variant in record["variants"]
    }
    _send(record["run"], settings, "efficiency", config, summary)


def _send(
    run: Mapping[str, Any],
    settings: Mapping[str, Any],
    job_type: str,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    history: Iterable[tuple[int, Mapping[str, Any]]] = (),
) -> None:
    with Tracker.of_run(run, settings, config, job_type) as tracker:
        for step, values in history:
            tracker.log(values, step)
        tracker.summary(summary)
