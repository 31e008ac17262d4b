"""One explicit training loop for every method, on accelerate for device, mixed precision and data parallelism.

The stock Trainer can't serve: sparse gradients break its norm, and step time and memory are columns of the paper. What
a step does depends on the configuration and the seed alone, so a killed run goes on from its checkpoint bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from finetune import checkpoint, memory
from finetune.data.examples import Examples
from finetune.evaluation import summed_loss
from finetune.metrics import improves
from finetune.tracking import Tracker
from sparsegrad import NonFiniteGradient, clip_grad_norm_

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("fp32", "bf16")
TIMED_STEPS = 1000  # the step time is the median over at most so many of the latest steps


class NonFiniteLoss(ValueError):
    """The loss, or the gradient of a method that looks at it, became NaN or infinite."""


class Ended(Exception):
    """Raised by ``on_evaluation`` to end a run (pruning): it is not wanted any more, nor are its checkpoints."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; the values stand in ``conf/protocol``, ``conf/scale`` and the search's result.

    Attributes:
        learning_rate: peak learning rate of every group.
        batch_size: examples of an optimizer step, over all processes and micro-batches.
        accumulation_steps: micro-batches that a batch is cut into.
        epochs: passes over the training split.
        max_steps: optimizer steps at most; None leaves it to the epochs.
        evaluation_steps: steps between evaluations.
        patience: evaluations without improvement after which training stops; None never stops early.
        schedule: ``constant``, ``linear`` or ``cosine``, after ``warmup_steps`` of linear warm-up.
        max_grad_norm: global norm to clip to; None does not clip (D29).
        precision: ``fp32``, or ``bf16`` autocast with float32 weights.
        seed: of data order and dropout.
        checkpoint_seconds: time between checkpoints.
    """

    learning_rate: float
    batch_size: int
    epochs: int
    evaluation_steps: int
    seed: int
    max_steps: int | None = None
    accumulation_steps: int = 1
    evaluation_batch_size: int = 64
    patience: int | None = None
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    precision: str = "fp32"
    checkpoint_seconds: float = 120.0
    log_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "evaluation_steps", "accumulation_steps", "evaluation_batch_size"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r}; it must be a whole number, at least 1.")
        if self.max_steps is not None and not _is_count(self.max_steps):
            raise ValueError(f"max_steps={self.max_steps!r}; it must be a whole number, at least 1, or null.")
        if not isinstance(self.learning_rate, int | float) or not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate!r}; it must be a positive number.")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r}; it must be a whole number.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}; allowed: {', '.join(SCHEDULES)}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}; allowed: {', '.join(PRECISIONS)}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1


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


def planned_steps(examples: int, options: TrainingOptions) -> int:
    """Optimizer steps of a run that is not stopped early."""
    steps = options.epochs * math.ceil(examples / options.batch_size)
    return steps if options.max_steps is None else min(steps, options.max_steps)


def learning_rate_factor(schedule: str, step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate at a step counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


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
) -> Progress:
    """Train, evaluate, keep the best weights, and leave them in the model.

    Args:
        model: prepared by a method, on the accelerator's device.
        optimizer: the method's.
        split: training rows.
        evaluate: gives loss and metrics of a model.
        metric: which of them is the score (:func:`finetune.metrics.improves`).
        checkpoints: folder for checkpoints of this run alone; None writes none. Of several processes the first writes,
            all read (their random generators are the first's then: with dropout, exact on one process only).
        digest: hash of the configuration; a checkpoint of another one is refused.
        on_evaluation: called with step and score; may raise :class:`Ended`.

    Returns:
        Progress at the end; ``stopped`` says why it ended.

    Raises:
        NonFiniteLoss: if the loss, of training or of validation, is NaN or infinite.
    """
    loop = _Loop(model, optimizer, split, options, accelerator)
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
                loss, seconds = loop.step(progress.step, total, progress.memory)
            except NonFiniteGradient:  # methods that select entries meet it before the loss is looked at
                raise _diverged("gradient is not finite", progress.step + 1, options.learning_rate) from None
            progress.step += 1
            progress.step_seconds = [*progress.step_seconds[-TIMED_STEPS + 1 :], seconds]
            bar.update()
            if progress.step % options.log_steps == 0 or progress.step == total:
                value = _finite(loss, progress.step, options.learning_rate)
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                tracker.log({"train/loss": value, "train/step_seconds": seconds}, progress.step)
            if progress.step % options.evaluation_steps == 0 or progress.step == total:
                _finite(loss, progress.step, options.learning_rate)
                memory.reset_peak(accelerator.device)
                result = evaluate(model)
                _finite(result["loss"], progress.step, options.learning_rate)
                progress.memory["peak_evaluation"] = memory.peak(accelerator.device)
                memory.reset_peak(accelerator.device)
                best = _note_evaluation(progress, result, metric, model, best, options)
                tracker.log({f"validation/{name}": value for name, value in result.items()}, progress.step)
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


class _Loop:
    """One optimizer step: micro-batches, sum over processes, clipping, schedule."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        split: Examples,
        options: TrainingOptions,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.wrapped = model, accelerator.prepare_model(model)
        self.optimizer, self.split, self.options, self.accelerator = optimizer, split, options, accelerator
        self._epoch, self._order = -1, torch.empty(0)

    def step(self, step: int, total: int, notes: dict[str, int | None]) -> tuple[Tensor, float]:
        """Do step number ``step`` (from 0); returns the mean loss over its predictions and the seconds it took."""
        options, device = self.options, self.accelerator.device
        started = self._clock(device)
        factor = learning_rate_factor(options.schedule, step, options.warmup_steps, total)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * factor
        rows = self._rows(step)
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        # A process without rows of a short last batch computes one, with weight 0: data parallelism waits for it.
        scale = self.accelerator.num_processes / max(1, self.split.targets(rows)) if mine else 0.0
        mine = mine or rows[:1]
        size = math.ceil(len(mine) / options.accumulation_steps)
        first = "saved_activations" not in notes
        if first:
            memory.reset_peak(device)
        loss = torch.zeros((), device=device)
        for start in range(0, len(mine), size):
            batch = {n: tensor.to(device) for n, tensor in self.split.batch(mine[start : start + size]).items()}
            labels = batch.pop("labels")
            with self._synchronise(start + size >= len(mine)):
                with memory.saved_activations(self.model, notes, first):
                    share = scale * summed_loss(self.wrapped(**batch).logits, labels)
                self.accelerator.backward(share)
            loss += share.detach()
        if first:
            notes["gradients"] = memory.gradient_bytes(self.model)
        if options.max_grad_norm is not None:
            clip_grad_norm_(self.model, options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if memory.peak(device) is not None:
            notes["peak_training"] = max(notes.get("peak_training") or 0, memory.peak(device) or 0)
        return loss, self._clock(device) - started

    def _rows(self, step: int) -> list[int]:
        """Rows of the batch of a step: every epoch is one permutation, drawn from the seed and the epoch."""
        options, examples = self.options, len(self.split)
        epoch, place = divmod(step, math.ceil(examples / options.batch_size))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(examples, generator=generator)
        return self._order[place * options.batch_size : (place + 1) * options.batch_size].tolist()

    def _synchronise(self, last: bool) -> AbstractContextManager[None]:
        """Sum gradients over processes with the last micro-batch only."""
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    @staticmethod
    def _clock(device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


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
