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

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from finetune.data.examples import Examples
from finetune.tracking.tracker import STEP_SECONDS, TRAIN_LOSS, Tracker
from finetune.training import checkpoint, memory
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


@dataclass
class Progress:
    """Where a run stands; JSON values, saved in checkpoints and copied into the record."""

    step: int = 0
    score: float | None = None
    best_step: int = 0
    stale: int = 0
    seconds: float = 0.0
    resumed: int = 0
    stopped: str = ""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    memory: dict[str, int | None] = field(default_factory=dict)


def make_accelerator(device: str, precision: str) -> Accelerator:
    """An accelerator on ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ValueError: on another word, or ``cuda`` without a CUDA device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r}; allowed: auto, cpu, cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device; use device=auto or device=cpu.")
    AcceleratorState._reset_state()  # it is one a process, and refuses the runs of another precision in a multirun
    return Accelerator(cpu=device == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")


def train(
    model: nn.Module,
    optimizer: Optimizer,
    split: Examples,
    evaluate: Callable[[nn.Module], dict[str, float]],
    metric: str,
    options: TrainingOptions,
    accelerator: Accelerator,
    *,
    tracker: Tracker,
    checkpoints: Path | None = None,
    digest: str = "",
    progress_bar: bool = True,
    label: str = "",
    on_evaluation: Callable[[int, float], None] | None = None,
    refresh: RefreshOptions | None = None,
) -> Progress:
    """Train, evaluate, keep the best weights, and leave them in the model.

    Args:
        model: prepared by a method, on the accelerator's device.
        optimizer: the method's.
        split: training rows.
        evaluate: gives loss and metrics of a model.
        metric: which of them is the score (:func:`finetune.training.metrics.improves`).
        checkpoints: folder for checkpoints of this run alone; None writes none. Of several processes the first writes,
            all read (their random generators are the first's then: with dropout, exact on one process only).
        digest: hash of the configuration; a checkpoint of another one is refused.
        on_evaluation: called with step and score; may raise :class:`Ended`.
        refresh: of the bases of truncated layers; its passes count in the time of the run, not in that of a step.

    Returns:
        Progress at the end; ``stopped`` says why it ended.

    Raises:
        NonFiniteLoss: if the loss, of training or of validation, is NaN or infinite.
    """
    loop = Steps(model, optimizer, split, options, accelerator)
    progress, best = Progress(), None
    if checkpoints is not None:
        loaded = checkpoint.load_checkpoint(checkpoints, digest, model, optimizer)
        if loaded is not None:
            progress, best = Progress(**loaded[0]), loaded[1]
            progress.resumed += 1
    total = planned_steps(len(split), options)
    writes = checkpoints is not None and accelerator.is_main_process
    started, saved = time.monotonic() - progress.seconds, time.monotonic()
    model.train()
    with tqdm(total=total, initial=progress.step, desc=label, disable=not progress_bar, leave=False) as bar:
        while progress.step < total and not progress.stopped:
            try:
                if refresh is not None and refresh.due(progress.step):
                    loop.refresh(progress.step, refresh)
                loss, seconds = loop.step(progress.step, total, progress.memory)
            except NonFiniteGradient:  # methods that select entries meet it before the loss is looked at
                raise _diverged("gradient is not finite", progress.step + 1, options.learning_rate) from None
            progress.step += 1
            progress.step_seconds = [*progress.step_seconds[-TIMED_STEPS + 1 :], seconds]
            bar.update()
            if progress.step % options.log_steps == 0 or progress.step == total:
                value = _finite(loss, progress.step, options.learning_rate)
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                tracker.log({TRAIN_LOSS: value, STEP_SECONDS: seconds}, progress.step)
            if progress.step % options.evaluation_steps == 0 or progress.step == total:
                _finite(loss, progress.step, options.learning_rate)
                memory.reset_peak(accelerator.device)
                result = evaluate(model)
                _finite(result["loss"], progress.step, options.learning_rate)
                progress.memory["peak_evaluation"] = memory.peak(accelerator.device)
                memory.reset_peak(accelerator.device)
                best = _note_evaluation(progress, result, metric, model, best, options)
                tracker.validation(result, progress.step)
                if on_evaluation is not None:
                    on_evaluation(progress.step, result[metric])
            progress.seconds = time.monotonic() - started
            if writes and time.monotonic() - saved >= options.checkpoint_seconds:
                checkpoint.save_checkpoint(checkpoints, progress.step, digest, model, optimizer, asdict(progress), best)
                saved = time.monotonic()
    progress.stopped = progress.stopped or "all steps done"
    progress.memory |= {k: v for k, v in memory.components(model, optimizer).items() if k != "gradients"}
    if best is not None:
        checkpoint.restore(model, best)
    return progress


def _finite(loss: Tensor | float, step: int, learning_rate: float) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise _diverged(f"loss is {value}", step, learning_rate)
    return value


def _diverged(what: str, step: int, learning_rate: float) -> NonFiniteLoss:
    return NonFiniteLoss(f"{what} at step {step}; lower learning_rate={learning_rate} or check the data.")


def _note_evaluation(
    progress: Progress,
    result: dict[str, float],
    metric: str,
    model: nn.Module,
    best: dict[str, Tensor] | None,
    options: TrainingOptions,
) -> dict[str, Tensor] | None:
    """Add an evaluation; returns the best weights so far, and sets ``stopped`` when patience is at an end."""
    score = result[metric]
    progress.evaluations.append({"step": progress.step, **result})
    if improves(metric, score, progress.score):
        progress.score, progress.best_step, progress.stale = score, progress.step, 0
        return checkpoint.snapshot(model)
    progress.stale += 1
    if options.patience is not None and progress.stale >= options.patience:
        progress.stopped = f"no improvement in {options.patience} evaluations"
    return best


def median_step_seconds(progress: Progress) -> float | None:
    """Median over the timed steps, the first five left out as warm-up where there are more."""
    times = progress.step_seconds[5:] if len(progress.step_seconds) > 5 else progress.step_seconds
    return median(times) if times else None
