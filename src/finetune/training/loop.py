"""One explicit training loop for every method, on accelerate for device, mixed precision and data parallelism.

The stock Trainer can't serve: sparse gradients break its norm, and step time and memory are columns of the paper. What
a step does depends on the configuration and the seed alone, so a killed run goes on from its checkpoint bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from finetune.data.examples import Examples
from finetune.tracking.tracker import STEP_SECONDS, TRAIN_LOSS, Tracker
from finetune.training import checkpoint, memory
from finetune.training.evaluation import Evaluation
from finetune.training.metrics import improves
from finetune.training.options import TrainingOptions, planned_steps
from finetune.training.refreshing import RefreshOptions
from finetune.training.steps import Steps
from sparsegrad import NonFiniteGradient

TIMED_STEPS = 1000  # the step time is the median over at most so many of the latest steps


class NonFiniteLoss(ValueError):
    """The loss, or the gradient of a method that looks at it, became NaN or infinite."""


class Ended(Exception):
    """Raised by ``on_evaluation`` to end a run (pruning): it is not wanted any more, nor are its checkpoints."""


class OutOfTime(Exception):
    """The time that was given is over; the run goes on from its checkpoint when it is called again."""


@dataclass
class Progress:
    """Where a run stands; JSON values, saved in checkpoints and copied into the record.

    ``captured`` counts the steps that were replayed from CUDA graphs; ``predictions`` are those of the validation rows,
    packed, at the best and at the last evaluation.
    """

    step: int = 0
    score: float | None = None
    best_step: int = 0
    stale: int = 0
    seconds: float = 0.0
    resumed: int = 0
    captured: int = 0
    damaged_checkpoints: int = 0
    stopped: str = ""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    memory: dict[str, int | None] = field(default_factory=dict)
    predictions: dict[str, Any] = field(default_factory=dict)


@dataclass
class Training:
    """A model that a method has prepared, and everything that its training needs.

    Attributes:
        model: on the accelerator's device; it is left with its best weights.
        optimizer: the method's.
        split: training rows.
        evaluate: gives loss, metrics and predictions of a model.
        metric: which of them is the score (:func:`finetune.training.metrics.improves`).
        options: how to train.
        accelerator: of :func:`finetune.training.processes.make_accelerator`.
        tracker: gets losses and evaluations as they come; None tracks nothing.
        checkpoints: folder for checkpoints of this run alone; None writes none. Of several processes the first writes,
            all read (their random generators are the first's then: with dropout, exact on one process only).
        digest: hash of the configuration; a checkpoint of another one is refused.
        progress_bar: whether one is shown, under ``label``.
        on_evaluation: called with step and score; may raise :class:`Ended`.
        refresh: of the bases of truncated layers; its passes count in the time of the run, not in that of a step.
        deadline: ``time.time()`` at which the time is over; None: it never is.
    """

    model: nn.Module
    optimizer: Optimizer
    split: Examples
    evaluate: Callable[[nn.Module], Evaluation]
    metric: str
    options: TrainingOptions
    accelerator: Accelerator
    tracker: Tracker | None = None
    checkpoints: Path | None = None
    digest: str = ""
    progress_bar: bool = False
    label: str = ""
    on_evaluation: Callable[[int, float], None] | None = None
    refresh: RefreshOptions | None = None
    deadline: float | None = None


def train(training: Training) -> Progress:
    """Train, evaluate, keep the best weights, and leave them in the model.

    Returns:
        Progress at the end; ``stopped`` says why it ended.

    Raises:
        NonFiniteLoss: if the loss, of training or of validation, is NaN or infinite.
        OutOfTime: if the time left is shorter than the longest step so far, with its evaluation and its checkpoint; a
            checkpoint is written.
    """
    model, optimizer, options = training.model, training.optimizer, training.options
    check_time(training.deadline)
    loop = Steps(model, optimizer, training.split, options, training.accelerator)
    progress, best = _resume(training)
    total = planned_steps(len(training.split), options)
    started, saved, longest = time.monotonic() - progress.seconds, time.monotonic(), 0.0
    model.train()
    bar = tqdm(total=total, initial=progress.step, desc=training.label, disable=not training.progress_bar, leave=False)
    with bar:
        while progress.step < total and not progress.stopped:
            begun = time.monotonic()
            replayed = loop.passes.captured
            loss, seconds = _step(loop, training.refresh, progress, total, options.learning_rate)
            progress.step += 1
            progress.captured += loop.passes.captured > replayed
            progress.step_seconds = [*progress.step_seconds[-TIMED_STEPS + 1 :], seconds]
            bar.update()
            if progress.step % options.log_steps == 0 or progress.step == total:
                value = _finite(loss, progress.step, options.learning_rate)
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                if training.tracker is not None:
                    training.tracker.log({TRAIN_LOSS: value, STEP_SECONDS: seconds}, progress.step)
            if progress.step % options.evaluation_steps == 0 or progress.step == total:
                _finite(loss, progress.step, options.learning_rate)
                best = _evaluate(training, progress, best)
            progress.seconds = time.monotonic() - started
            longest = max(longest, time.monotonic() - begun)
            ends = progress.step < total and not progress.stopped and _is_over(training.deadline, longest)
            if _writes(training) and (ends or time.monotonic() - saved >= options.checkpoint_seconds):
                _save(training, progress, best)
                saved = time.monotonic()
                longest = max(longest, saved - begun)
            if ends:
                raise OutOfTime(f"step {progress.step} of {total}")
    progress.stopped = progress.stopped or "all steps done"
    progress.memory |= memory.components(model, optimizer)
    if best is not None:
        checkpoint.restore(model, best)
    return progress


def check_time(deadline: float | None) -> None:
    """Begin nothing when the time is over.

    Raises:
        OutOfTime: if it is.
    """
    if _is_over(deadline, 0.0):
        raise OutOfTime("not begun")


def _is_over(deadline: float | None, seconds: float) -> bool:
    """Whether less than so much time is left."""
    return deadline is not None and time.time() + seconds >= deadline


def _resume(training: Training) -> tuple[Progress, dict[str, Tensor] | None]:
    """Where the run stands, and its best weights so far: at the beginning, or at its newest checkpoint."""
    if training.checkpoints is None:
        return Progress(), None
    found, best, damaged = checkpoint.load_checkpoint(
        training.checkpoints, training.digest, training.model, training.optimizer
    )
    progress = Progress() if found is None else Progress(**found)
    progress.resumed += found is not None
    progress.damaged_checkpoints += damaged
    return progress, best


def _save(training: Training, progress: Progress, best: dict[str, Tensor] | None) -> None:
    model, optimizer, digest = training.model, training.optimizer, training.digest
    assert training.checkpoints is not None
    checkpoint.save_checkpoint(training.checkpoints, progress.step, digest, model, optimizer, asdict(progress), best)


def _writes(training: Training) -> bool:
    return training.checkpoints is not None and training.accelerator.is_main_process


def _step(
    loop: Steps, refresh: RefreshOptions | None, progress: Progress, total: int, learning_rate: float
) -> tuple[Tensor, float]:
    try:
        if refresh is not None and refresh.due(progress.step):
            loop.refresh(progress.step, refresh)
        return loop.step(progress.step, total, progress.memory)
    except NonFiniteGradient:  # methods that select entries meet it before the loss is looked at
        raise _diverged("gradient is not finite", progress.step + 1, learning_rate) from None


def _evaluate(training: Training, progress: Progress, best: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Evaluate and tell whoever listens; returns the best weights so far."""
    device = training.accelerator.device
    memory.reset_peak(device)
    result = training.evaluate(training.model)
    _finite(result["loss"], progress.step, training.options.learning_rate)
    peak = memory.peak(device)  # replayed passes allocate nothing: those that were captured tell
    before = progress.memory.get("peak_evaluation") or 0
    progress.memory["peak_evaluation"] = None if peak is None else max(before, peak)
    memory.reset_peak(device)
    best = _note_evaluation(progress, result, training, best)
    if training.tracker is not None:
        training.tracker.validation(result.values, progress.step)
    if training.on_evaluation is not None:
        training.on_evaluation(progress.step, result[training.metric])
    return best


def _finite(loss: Tensor | float, step: int, learning_rate: float) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise _diverged(f"loss is {value}", step, learning_rate)
    return value


def _diverged(what: str, step: int, learning_rate: float) -> NonFiniteLoss:
    return NonFiniteLoss(f"{what} at step {step}; lower learning_rate={learning_rate} or check the data.")


def _note_evaluation(
    progress: Progress, result: Evaluation, training: Training, best: dict[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """Add an evaluation; returns the best weights so far, and sets ``stopped`` when patience is at an end."""
    score, patience = result[training.metric], training.options.patience
    progress.evaluations.append({"step": progress.step, **result.values})
    progress.predictions |= result.packed_rows() | {"last": result.packed_predictions()}
    if improves(training.metric, score, progress.score):
        progress.score, progress.best_step, progress.stale = score, progress.step, 0
        progress.predictions["best"] = progress.predictions["last"]
        return checkpoint.snapshot(training.model)
    progress.stale += 1
    if patience is not None and progress.stale >= patience:
        progress.stopped = f"no improvement in {patience} evaluations"
    return best


def median_step_seconds(progress: Progress) -> float | None:
    """Median over the timed steps, the first five left out as warm-up where there are more."""
    times = progress.step_seconds[5:] if len(progress.step_seconds) > 5 else progress.step_seconds
    return median(times) if times else None
