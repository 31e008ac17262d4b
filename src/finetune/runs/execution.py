"""What every run does once its model and method are ready: train, track, keep checkpoints, fill in the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from finetune import models
from finetune.data.examples import Examples
from finetune.runs import record_content
from finetune.tracking.tracker import SUMMARY, Tracker, chosen
from finetune.training import checkpoint
from finetune.training.loop import Ended, NonFiniteLoss, train
from finetune.training.options import TrainingOptions
from finetune.training.refreshing import RefreshOptions
from sparsegrad import Basis, load_bases


def execute(
    config: Mapping[str, Any],
    record: dict[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    split: Examples,
    evaluate: Callable[[nn.Module], dict[str, float]],
    metric: str,
    options: TrainingOptions,
    accelerator: Accelerator,
    *,
    on_evaluation: Callable[[int, float], None] | None = None,
    on_finished: Callable[[nn.Module], None] | None = None,
    refresh: RefreshOptions | None = None,
) -> dict[str, Any]:
    """Train a prepared model to the end and complete its record.

    Args:
        config: ``checkpoints``, ``progress`` and ``wandb`` are read.
        record: :func:`finetune.runs.record_content.header` and more; ``run`` names checkpoints and tracking.
        model, optimizer: a method's.
        split, evaluate, metric, options, accelerator, on_evaluation, refresh: see :func:`finetune.training.loop.train`.
        on_finished: called with the model at its best weights before the checkpoints are deleted; of several processes
            in the first.

    Returns:
        The record. A run whose loss is not finite gives one with status ``failed``.
    """
    run = record["run"]
    digest = run["config_hash"]
    folder = Path(config["checkpoints"]) / digest
    label = f"{run['model']} {run['method']} {run['task']} seed {run['seed']}"
    with Tracker.of_record(record, config["wandb"], main_process=accelerator.is_main_process) as tracker:
        try:
            progress = train(
                model,
                optimizer,
                split,
                evaluate,
                metric,
                options,
                accelerator,
                tracker=tracker,
                checkpoints=folder,
                digest=digest,
                progress_bar=config["progress"] and accelerator.is_main_process,
                label=label,
                on_evaluation=on_evaluation,
                refresh=refresh,
            )
        except Ended:
            _forget(accelerator, folder)
            raise
        except NonFiniteLoss as error:
            _forget(accelerator, folder)
            record |= {"status": "failed", "error": str(error), "score": None, "metric": metric}
            tracker.summary(chosen(record, SUMMARY))
            return record
        record |= record_content.outcome(progress, metric, options, len(split))
        tracker.summary(chosen(record, SUMMARY))
    if on_finished is not None and accelerator.is_main_process:
        on_finished(model)
    accelerator.wait_for_everyone()
    _forget(accelerator, folder)
    return record


def read_bases(path: Path, expected: Mapping[str, Any], model: str) -> tuple[dict[str, Basis], dict[str, Any]]:
    """Bases from a file, checked against what they must have been made for.

    Args:
        path: written by a basis stage.
        expected: entries of its metadata, ``model_sha256`` among them.
        model: name, for the message.

    Raises:
        ValueError: if they are missing, damaged, or of another checkpoint, task or preliminary phase.
    """
    bases, facts = load_bases(path)
    if facts.get("model_sha256") != expected["model_sha256"]:
        raise ValueError(
            f"{path} was made for checkpoint {facts.get('model_sha256')}, this run starts from "
            f"{expected['model_sha256']}: run the gradients and basis stages for model={model}."
        )
    for name, value in expected.items():
        if facts.get(name) != value:
            raise ValueError(
                f"{path} was made with {name}={facts.get(name)}, this run has {name}={value}: "
                "run the gradients and basis stages for this configuration."
            )
    return bases, facts


def check_length(model: nn.Module, splits: Iterable[Examples]) -> None:
    """Refuse inputs that the model has no positions for, before torch does in its own words.

    Raises:
        ValueError: if the longest row of a split is longer than the model takes.
    """
    longest, limit = max(split.longest for split in splits), models.positions(model)
    if limit is not None and longest > limit:
        raise ValueError(
            f"inputs of {longest} tokens; this model has {limit} positions: set protocol.max_length={limit} or less."
        )


def _forget(accelerator: Accelerator, folder: Path) -> None:
    """Delete a run's checkpoints; of several processes the one that writes them does."""
    if accelerator.is_main_process:
        checkpoint.remove_checkpoints(folder)
