"""Step times of several variants, interleaved in rounds, so that drift of the machine meets all of them alike.

A round runs every variant once over the same batches; every second round runs them in reverse order.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, median, quantiles
from typing import Any

import torch
from torch import Tensor

from finetune.efficiency.machine import seconds_of
from finetune.efficiency.variants import Trainee, train_step

Batch = Mapping[str, Tensor]


def interleaved(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name) in the order of measuring: forwards and backwards in turn."""
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            yield number, name


def time_variants(
    makers: Mapping[str, Callable[[], Trainee]],
    batches: Sequence[Batch],
    *,
    rounds: int,
    warmup_steps: int,
    device: torch.device,
    together: bool,
    kept: dict[str, Trainee] | None = None,
    step: Callable[[Trainee, Batch], None] = train_step,
    settle: Callable[[Trainee, Sequence[Batch]], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[list[float]]]:
    """Seconds of every step: variant -> rounds -> batches.

    Args:
        makers: variant -> what builds it.
        batches: on the device; every variant trains all of them in every round, in this order.
        warmup_steps: steps before a variant's first timed one, and one in every later round.
        together: keep all variants in memory, or build each anew in every round.
        kept: variants that are built already; with ``together``, all of them afterwards.
        step: trains one batch.
        settle: trains further before a variant's first timed step.
        clock: of a CPU, see :func:`finetune.efficiency.machine.seconds_of`.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in makers}
    kept = {} if kept is None else kept
    for _, name in interleaved(list(makers), rounds):
        trainee = kept[name] if name in kept else makers[name]()
        fresh = not together or not found[name]
        if together:
            kept[name] = trainee
        for number in range(warmup_steps if fresh else 1):
            step(trainee, batches[number % len(batches)])
        if fresh and settle is not None:
            settle(trainee, batches)
        calls = [lambda batch=batch, trainee=trainee: step(trainee, batch) for batch in batches]
        found[name].append(seconds_of(calls, device, clock))
        del trainee, calls
        if not together:
            release(device)
    return found


def release(device: torch.device) -> None:
    """Give freed memory back, so that the next variant starts from the same state."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def summarise(seconds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Medians with spread.

    Args:
        seconds: rounds of step times.

    Returns:
        ``steps_per_second`` (mean over rounds of 1 / median step time), ``rounds`` (its values), and ``step_seconds``
        (median, quartiles, mean, least, number) over all steps.
    """
    steps = [time for times in seconds for time in times]
    rates = [1 / median(times) for times in seconds]
    low, middle, high = quantiles(steps, n=4, method="inclusive") if len(steps) > 1 else [steps[0]] * 3
    spread = {"median": middle, "q25": low, "q75": high, "mean": fmean(steps), "min": min(steps), "n": len(steps)}
    return {"steps_per_second": fmean(rates), "rounds": rates, "step_seconds": spread}


def ratio(full: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Steps per second of a variant over those of full fine-tuning, batch by batch of the same round.

    Returns:
        ``rounds`` (median over the batches of a round) and their ``mean``.
    """
    pairs = zip(full, other, strict=True)
    rounds = [median(f / o for f, o in zip(ours, theirs, strict=True)) for ours, theirs in pairs]
    return {"mean": fmean(rounds), "rounds": rounds}
