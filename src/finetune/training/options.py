"""How a run trains: the options of the loop, its planned steps and its learning rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
        logits_chunk: tokens whose logits a causal language model holds at a time; None holds all of a micro-batch.
        graphs: ``auto`` replays passes from CUDA graphs where it can (:mod:`finetune.training.graphs`), ``off`` none.
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
    logits_chunk: int | None = None
    graphs: str = "off"


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
