"""One record: all variants of one model on batches of one task's lengths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from finetune import models
from finetune.efficiency import machine
from finetune.efficiency.footprint import measure_memory, take_workspaces
from finetune.efficiency.lengths import PADDINGS, Lengths, make_batches
from finetune.efficiency.stage import Stage
from finetune.efficiency.timing import Batch, ratio, release, summarise, time_variants
from finetune.efficiency.variants import (
    PRECISIONS,
    Trainee,
    Variant,
    make_method,
    make_model,
    make_trainee,
    random_bases,
    select_variants,
    why_missing,
)
from finetune.methods.base import count_parameters, kept_entries
from finetune.methods.costs import RESIDENT, predicted_peaks

log = logging.getLogger(__name__)

KEEPS = ("auto", "together", "each_round")
SPARE = 0.8  # share of the free memory that variants kept together may take


@dataclass(frozen=True)
class EfficiencyOptions:
    """How to measure; the same for all variants.

    Attributes:
        batch_size: rows of a batch, one backward pass and one optimizer step each.
        batches: different batches of a round.
        rounds: how often every variant trains all of them.
        warmup_steps: untimed steps of a freshly built variant.
        padding, max_length: as the protocol pads.
        precision: ``fp32``, or ``bf16`` autocast with float32 weights.
        variants: names; None takes all.
        keep: ``together`` keeps all variants in memory, ``each_round`` builds each anew in every round, ``auto`` keeps
            them together if they fit.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: of torch on the CPU; None leaves torch's choice.
        seed: of weights, bases and batches.

    Raises:
        ValueError: if a value is out of range.
    """

    batch_size: int
    batches: int
    rounds: int
    warmup_steps: int
    padding: str = "longest"
    max_length: int = 128
    precision: str = "fp32"
    variants: Sequence[str] | None = None
    keep: str = "auto"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    learning_rate: float = 1e-5
    num_labels: int = 2

    def __post_init__(self) -> None:
        whole = dict.fromkeys(("batch_size", "batches", "rounds", "warmup_steps", "max_length", "num_labels"), 1)
        for name, least in (whole | {"threads": 1, "seed": 0}).items():
            value = getattr(self, name)
            if (value is None and name == "threads") or (type(value) is int and value >= least):
                continue
            raise ValueError(f"{name}={value!r}; it must be a whole number, at least {least}.")
        for name, allowed in (("padding", PADDINGS), ("precision", tuple(PRECISIONS)), ("keep", KEEPS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}.")
        select_variants(self.variants)


def measure_task(
    model: Mapping[str, Any], protocol: Mapping[str, Any], lengths: Lengths, options: EfficiencyOptions, stage: Stage
) -> dict[str, Any]:
    """Measure all variants on one task and write the record, or read it where it is finished.

    Args:
        model: the configuration group: name, title, architecture, target_modules, layers_to_transform, lora_rank, k.
        protocol: the group; density, orientation, train, frozen, lora_scale and meprop_optimizer are read.
        lengths: of the task.
        stage: the record's place and names.

    Raises:
        ValueError: if the device is missing or others use it, or an option or configuration is refused.
    """
    named = {"model": model["name"], "task": lengths.task, "protocol": protocol["name"]}
    return replace(stage, kind="efficiency", named=named).run(
        identity(model, protocol, lengths, options),
        lambda device, _: _measure(model, protocol, lengths, options, device),
        device=options.device,
        threads=options.threads,
    )


def identity(
    model: Mapping[str, Any], protocol: Mapping[str, Any], lengths: Lengths, options: EfficiencyOptions
) -> dict[str, Any]:
    """What decides the numbers, beside the machine, so that a record is reused."""
    read = ("density", "orientation", "train", "frozen", "lora_scale", "meprop_optimizer")
    return {
        "model": {k: model[k] for k in ("architecture", "target_modules", "layers_to_transform", "lora_rank", "k")},
        "protocol": {name: protocol[name] for name in read},
        "lengths": lengths.facts()["sha256"],
        "options": asdict(options),
        "variants": [asdict(variant) for variant in select_variants(options.variants)],
        "missing": [],  # in the hashes of committed records: forms that sparsegrad did not have
    }


def _measure(
    model: Mapping[str, Any],
    protocol: Mapping[str, Any],
    lengths: Lengths,
    options: EfficiencyOptions,
    device: torch.device,
) -> dict[str, Any]:
    batches, shapes = _batches(model, lengths, options, device)
    bases = random_bases(model, protocol, seed=options.seed, device=device)
    entries, makers = [], {}
    for variant in select_variants(options.variants):
        how = {"num_labels": options.num_labels, "learning_rate": options.learning_rate, "seed": options.seed}
        make = partial(make_trainee, variant, model, protocol, bases, **how, device=device)
        entries.append(asdict(variant) | _memory(variant, make, model, protocol, batches, options))
        if entries[-1]["status"] == "finished":
            makers[variant.name] = make
    together = _keep_together(entries, options.keep, device)
    how = {"rounds": options.rounds, "warmup_steps": options.warmup_steps, "precision": options.precision}
    _add_times(entries, time_variants(makers, batches, **how, device=device, together=together))
    treatment = {
        **asdict(options),
        "optimizer": "AdamW, fused; SparseGrad and lazy MeProp: lazy Adam for the target matrices",
        "train": protocol["train"],
        "density": protocol["density"],
        "bases": "random orthogonal: speed does not depend on which orthogonal matrices they are",
        "kept": "all variants in memory" if together else "each variant built anew in every round",
        "order": "interleaved: every round runs all variants over all batches, every second round in reverse",
        "batches_at": "on the device before the clock starts",
    }
    return {
        "model": {"title": model["title"], "architecture": dict(model["architecture"]), "random_weights": True},
        "treatment": treatment,
        "lengths": lengths.facts() | shapes,
        "variants": entries,
    }


def _batches(
    model: Mapping[str, Any], lengths: Lengths, options: EfficiencyOptions, device: torch.device
) -> tuple[list[Batch], dict[str, Any]]:
    """Batches on the device, the longest first, so that warm-up meets the largest shapes."""
    plain = make_model(model["architecture"], options.num_labels, "meta")
    made, shapes = make_batches(
        lengths,
        batch_size=options.batch_size,
        batches=options.batches,
        padding=options.padding,
        max_length=options.max_length,
        vocabulary=plain.config.vocab_size,
        padding_id=plain.config.pad_token_id or 0,
        num_labels=options.num_labels,
        seed=options.seed,
    )
    limit, longest = models.positions(plain), max(batch["input_ids"].shape[1] for batch in made)
    if limit is not None and longest > limit:
        raise ValueError(f"inputs of {longest} tokens; this model has {limit} positions: set max_length={limit}.")
    order = sorted(range(len(made)), key=lambda place: -made[place]["input_ids"].shape[1])
    shapes["batches"] = [shapes["batches"][place] for place in order]
    return [{name: tensor.to(device) for name, tensor in made[place].items()} for place in order], shapes


def _memory(
    variant: Variant,
    make: Callable[[], Trainee],
    model: Mapping[str, Any],
    protocol: Mapping[str, Any],
    batches: Sequence[Batch],
    options: EfficiencyOptions,
) -> dict[str, Any]:
    """Parameters and memory of a variant, measured on the longest batch and by formula, or why there is none."""
    plain, method = make_model(model["architecture"], options.num_labels, "meta"), make_method(variant, model, protocol)
    shapes = [target.shape for target in method.targets.find(plain)]
    missing = why_missing(variant, shapes, kept_entries(model["k"], protocol["density"], shapes[0]))
    if missing:
        return _refused(variant.name, "skipped", missing)
    log.info("memory of %s", variant.name)
    ids = batches[0]["input_ids"]
    how = {"precision": options.precision, "device": ids.device}
    try:
        take_workspaces(make, batches[0], **how)
        found = measure_memory(make, batches[0], **how, warmup_steps=options.warmup_steps)
    except torch.OutOfMemoryError as error:
        release(ids.device)
        return _refused(variant.name, "failed", f"out of memory: {str(error).splitlines()[0]}")
    width = 2 if options.precision == "bf16" else 4
    predicted = predicted_peaks(method, found["components"], shapes, positions=ids.numel(), width=width)
    ratios = {peak: value / found[peak] for peak, value in predicted.items()}
    memory = found | {"predicted": predicted, "predicted_over_measured": ratios, "batch": list(ids.shape)}
    parameters = count_parameters(plain, method)
    return {"status": "finished", "reason": None, "parameters": parameters, "memory": memory}


def _refused(name: str, status: str, reason: str) -> dict[str, Any]:
    log.warning("%s %s: %s", name, status, reason)
    return {"status": status, "reason": reason}


def _keep_together(entries: Sequence[Mapping[str, Any]], keep: str, device: torch.device) -> bool:
    """Whether all variants stay in memory: as asked, or if their resident parts and one peak fit."""
    if keep != "auto":
        return keep == "together"
    found = [entry["memory"] for entry in entries if entry["status"] == "finished"]
    resident = [sum(memory["components"][name] for name in RESIDENT) for memory in found]
    moving = [memory["peak_training"] - own for memory, own in zip(found, resident, strict=True)]
    return sum(resident) + max(moving, default=0) <= SPARE * machine.free_memory(device)


def _add_times(entries: Sequence[dict[str, Any]], seconds: Mapping[str, list[list[float]]]) -> None:
    for entry in entries:
        times = seconds.get(entry["name"])
        if times is None:
            continue
        entry.update(summarise(times))
        entry["seconds"] = times
        if "full" in seconds:
            entry["ratio_to_full"] = ratio(seconds["full"], times)
