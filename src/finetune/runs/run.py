"""One run: from a problem to a record. Cells and searches call this and nothing deeper."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from finetune.methods import Method, build_method
from finetune.methods.base import count_parameters
from finetune.models.merged import save_merged
from finetune.runs import record_content
from finetune.runs.problem import Problem, Run
from finetune.store import places, records
from finetune.store.files import sweep
from finetune.tracking.tracker import SUMMARY, Tracker, chosen
from finetune.training import checkpoint, memory
from finetune.training.loop import Ended, NonFiniteLoss, Training, check_time, train
from finetune.training.processes import make_accelerator
from finetune.training.refreshing import refresh_options


def run_once(
    problem: Problem,
    run: Run,
    *,
    on_evaluation: Callable[[int, float], None] | None = None,
    path: Path | None = None,
    keep: Path | None = None,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Prepare, train and evaluate one model. Its checkpoints go when all that is kept of it is on disk.

    Args:
        problem: may be shared with other runs.
        run: what to run.
        on_evaluation: see :class:`finetune.training.loop.Training`.
        path: file for the record; None writes none.
        keep: folder for the merged, plain model with the best weights and its tokenizer; None keeps none.
        deadline: see :class:`finetune.training.loop.Training`.

    Returns:
        The record. A run whose loss is not finite, or that the device has no memory for, gives one with status
        ``failed``.

    Raises:
        OutOfTime: if the time is over; its checkpoint is kept, and the next call goes on from it.
        RuntimeError: if the device has no memory for a run that writes no record.
        ValueError: on bad configuration or data, or if another process does this run.
        OSError: if its files can't be written; found before it trains.
    """
    check_time(deadline)
    accelerator = make_accelerator(problem.config["device"], problem.precision)
    with _writer(problem, run, path, keep) if accelerator.is_main_process else nullcontext():
        try:
            return _run_once(problem, run, accelerator, on_evaluation, path, keep, deadline)
        except RuntimeError as error:
            if path is None or accelerator.num_processes > 1 or not should_reduce_batch_size(error):
                raise
            record = record_content.header(problem, run) | _failed(error, problem.metric(run.task))
            records.write_record(path, record)
            return record
        finally:
            if accelerator.device.type == "cuda":  # other processes may share the device
                clear_device_cache(garbage_collection=True)


@contextmanager
def _writer(problem: Problem, run: Run, path: Path | None, keep: Path | None) -> Iterator[None]:
    """Hold a run's checkpoints, and look before it whether its files can be written."""
    folder = problem.checkpoints(run)
    with places.locked(folder, folder.parent):
        sweep(folder)
        if path is not None:
            places.check_writable(path.parent, path.name)
            sweep(path.parent, path.name)
        if keep is not None:
            places.check_writable(keep.parent)
            sweep(keep.parent, keep.name)
            if keep.is_file():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(keep))
        yield


def forget(problem: Problem, run: Run) -> None:
    """Delete the checkpoints that a kill left of a finished run, unless another process does this run."""
    folder = problem.checkpoints(run)
    if folder.exists():
        with suppress(places.Busy), places.locked(folder, folder.parent):
            checkpoint.remove_checkpoints(folder)


def _run_once(
    problem: Problem,
    run: Run,
    accelerator: Accelerator,
    on_evaluation: Callable[[int, float], None] | None,
    path: Path | None,
    keep: Path | None,
    deadline: float | None,
) -> dict[str, Any]:
    config, task = problem.config, run.task
    options, device = problem.options(run, accelerator.num_processes), accelerator.device
    model = problem.load_model(task, run.seed)
    one_backward = options.accumulation_steps == 1 and accelerator.num_processes == 1
    method, basis = _method(problem, run, model, device, one_backward)
    parameters = count_parameters(model, method)
    model = problem.prepare(method, model, device, run.seed)
    training = Training(
        model=model,
        optimizer=method.optimizer(model, options.learning_rate, options.weight_decay),
        split=problem.splits(task)["train"],
        evaluate=problem.evaluator(task, options, accelerator),
        metric=problem.metric(task),
        options=options,
        accelerator=accelerator,
        checkpoints=problem.checkpoints(run),
        digest=problem.digest(run),
        progress_bar=config["progress"] and accelerator.is_main_process,
        label=f"{config['model']['name']} {config['method']['name']} {task} seed {run.seed}",
        on_evaluation=on_evaluation,
        refresh=refresh_options(config["method"]),
        deadline=deadline,
    )
    record = record_content.header(problem, run) | {
        "treatment": problem.treatment(task)
        | {
            "precision": options.precision,
            "optimizer": "AdamW",
            "target_matrices": parameters["wrapped_layers"],
            "train": config["protocol"]["train"],
            "max_steps": options.max_steps,
            "evaluation_steps": options.evaluation_steps,
        },
        "parameters": parameters,
        "basis": basis,
        "device": memory.device_name(device) | {"processes": accelerator.num_processes},
    }
    if problem.baseline:
        record["baseline"] = training.evaluate(model).values
    torch.manual_seed(run.seed)
    with Tracker.of_record(record, config["wandb"], main_process=accelerator.is_main_process) as tracker:
        training.tracker = tracker
        record |= _outcome(training)
        tracker.summary(chosen(record, SUMMARY))
    if record["status"] == "finished" and accelerator.is_main_process and keep is not None:
        _keep(problem, method.merge(model), keep, training.digest)
    if accelerator.is_main_process and path is not None:
        records.write_record(path, record)
    accelerator.wait_for_everyone()
    _forget(training)
    return record


def _outcome(training: Training) -> dict[str, Any]:
    """Train; what the record says of how it went. A run that is not wanted any more leaves no checkpoints."""
    try:
        return record_content.outcome(train(training), training)
    except NonFiniteLoss as error:
        return _failed(error, training.metric)
    except Ended:
        _forget(training)
        raise


def _failed(error: Exception, metric: str) -> dict[str, Any]:
    return {"status": "failed", "error": str(error), "score": None, "metric": metric}


def _forget(training: Training) -> None:
    """Delete a run's checkpoints; of several processes the one that writes them does."""
    if training.accelerator.is_main_process and training.checkpoints is not None:
        checkpoint.remove_checkpoints(training.checkpoints)


def _method(
    problem: Problem, run: Run, model: nn.Module, device: torch.device, one_backward: bool
) -> tuple[Method, dict[str, Any]]:
    """The configured method; one that rotates gradients gets its bases from the file, or collects them here."""
    bases, facts = None, {}
    if problem.basis_scope == "task":
        bases, facts = problem.bases(run.task)
    elif problem.basis_scope == "run":
        collected = problem.collect(model, run.task, run.seed, device)
        bases, facts = collected.bases(), collected.facts
    config = problem.config
    how = {"one_backward_a_step": one_backward, "device": device.type, "seed": run.seed}
    method = build_method(config["method"], config["model"], config["protocol"], bases=bases, **how)
    return method, {name: value for name, value in facts.items() if name != "content"}


def _keep(problem: Problem, plain: Any, folder: Path, digest: str) -> None:
    plain = plain.to(problem.stored_dtype)
    plain.config.use_cache = True
    save_merged(plain, problem.tokenizer, folder, {"config_hash": digest} | problem.kept_facts())
