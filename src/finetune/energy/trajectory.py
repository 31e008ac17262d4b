"""A fine-tuning run that is stopped at chosen steps to look at its gradients, and goes on as if it had not been."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from finetune.energy.probe import Probe
from finetune.training.loop import NonFiniteLoss
from finetune.training.options import TrainingOptions
from finetune.training.steps import Steps
from sparsegrad import NonFiniteGradient, Target

CHECKED_STEPS = 10  # between looks at the loss: reading it waits for the device


@dataclass
class Looks:
    """What a trajectory gives.

    Attributes:
        steps: for every chosen step its ``step``, validation ``score``, and the numbers of :meth:`Probe.look`.
        nonzero: for every target, in their order: percent of the output gradient that is not zero, rounded, as a text
            -> training steps. The paper's Figure 3 (right) is this count.
        pictures: heat maps of the first and the last chosen step, ``step<step>.<name>``.
    """

    steps: list[dict[str, Any]]
    nonzero: list[dict[str, int]]
    pictures: dict[str, Tensor]


def follow(
    model: nn.Module,
    optimizer: Optimizer,
    probe: Probe,
    steps: Sequence[int],
    options: TrainingOptions,
    accelerator: Accelerator,
    *,
    score: Callable[[nn.Module], float],
    label: str = "",
) -> Looks:
    """Train a prepared model on the probe's split and look at it at chosen steps.

    Args:
        model, optimizer: of ``probe.method``, on the accelerator's device.
        steps: rising; 0 is before the first step. Training ends at the last.
        options: its ``max_steps`` is the last of ``steps``; nothing is evaluated but ``score``.
        score: of the model, on the validation split.
        label: of the progress bar; without one there is none.

    Raises:
        NonFiniteLoss: if the run diverges.
        ValueError: if steps do not rise from 0 or more.
    """
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0:
        raise ValueError(f"steps={list(steps)}; they must rise and begin at 0 or later.")
    loop, looks = Steps(model, optimizer, probe.split, options, accelerator), Looks([], [], {})
    counts: dict[str, Counter[str]] = {}
    total, done = steps[-1], 0
    torch.manual_seed(options.seed)
    model.train()
    with tqdm(total=total, desc=label, disable=not label, leave=False) as bar:
        for chosen in steps:
            with _counting_nonzero(probe.method.targets.find(model), counts):
                while done < chosen:
                    _train_step(loop, done, total, options.learning_rate)
                    done += 1
                    bar.update()
            bar.set_postfix_str(f"gradients at step {chosen}")
            pictures = chosen in (steps[0], steps[-1])
            numbers, found = probe.look(model, accelerator.device, pictures)
            looks.steps.append({"step": chosen, "score": score(model)} | numbers)
            looks.pictures |= {f"step{chosen}.{name}": picture for name, picture in found.items()}
            model.train()
    looks.nonzero = [dict(sorted(count.items(), key=lambda item: int(item[0]))) for count in counts.values()]
    return looks


def _train_step(loop: Steps, step: int, total: int, learning_rate: float) -> None:
    try:
        loss, _ = loop.step(step, total, {"saved_activations": None})
    except NonFiniteGradient:
        raise NonFiniteLoss(f"gradient is not finite at step {step + 1}; lower learning_rate={learning_rate}") from None
    if (step + 1) % CHECKED_STEPS == 0 and not math.isfinite(float(loss)):
        raise NonFiniteLoss(f"loss is {float(loss)} at step {step + 1}; lower learning_rate={learning_rate}.")


@contextmanager
def _counting_nonzero(found: Sequence[Target], counts: dict[str, Counter[str]]) -> Iterator[None]:
    """Count the non-zero entries of every target's output gradient in the training steps inside the ``with``."""

    def hook(name: str) -> Any:
        count = counts.setdefault(name, Counter())

        def take(gradient: Tensor) -> None:
            count[str(round(100 * float((gradient != 0).float().mean())))] += 1

        def forward(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(take)

        return forward

    handles = [target.module.register_forward_hook(hook(target.name)) for target in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
