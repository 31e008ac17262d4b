"""One record: all variants of one model on batches of one task's lengths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from finetune import models
from finetune.efficiency import machine
from finetune.efficiency.footprint import measure_memory, take_workspaces
from finetune.efficiency.lengths import PADDINGS, Lengths, make_batches
from finetune.efficiency.timing import Batch, ratio, release, summarise, time_variants
from finetune.efficiency.variants import (
    PRECISIONS,
    Trainee,
    Variant,
    make_model,
    make_trainee,
    random_bases,
    select_variants,
    why_missing,
)
from finetune.methods import build_targets
from finetune.methods.base import kept_entries
from finetune.methods.costs import RESIDENT, predicted_peaks
from finetune.store import records

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
        for name in ("batch_size", "batches", "rounds", "warmup_steps", "max_length", "num_labels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}; it must be a whole number, at least 1.")
        for name, allowed in (("padding", PADDINGS), ("precision", tuple(PRECISIONS)), ("keep", KEEPS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}.")
        select_variants(self.variants)


def measure_task(
    model: Mapping[str, Any],
    protocol: Mapping[str, Any],
    lengths: Lengths,
    options: EfficiencyOptions,
    *,
    experiment: str = "hand",
    scale: str = "hand",
    version: int = 1,
) -> dict[str, Any]:
    """Measure all variants on one task and return the record.

    Args:
        model: the configuration group: name, title, architecture, target_modules, layers_to_transform, lora_rank, k.
        protocol: the group; density, orientation, train, frozen, lora_scale and meprop_optimizer are read.
        lengths: of the task.
        experiment, scale, version: for the record.

    Raises:
        ValueError: if the device is missing or others use it, or an option or configuration is refused.
    """
    device = machine.find_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    before = machine.others(device)
    warnings = machine.check_alone(device, before)
    batches, shapes = _batches(model, lengths, options, device)
    bases = random_bases(model, protocol, seed=options.seed, device=device)
    entries, makers = [], {}
    for variant in select_variants(options.variants):
        entry: dict[str, Any] = asdict(variant) | {"status": "finished", "reason": None}
        make = partial(
            make_trainee,
            variant,
            model,
            protocol,
            bases,
            num_labels=options.num_labels,
            learning_rate=options.learning_rate,
            seed=options.seed,
            device=device,
        )
        entries.append(_with_memory(entry, variant, make, model, protocol, batches, options, device))
        if entry["status"] == "finished":
            makers[variant.name] = make
    together = _keep_together(entries, options.keep, device)
    seconds = time_variants(
        makers,
        batches,
        rounds=options.rounds,
        warmup_steps=options.warmup_steps,
        precision=options.precision,
        device=device,
        together=together,
    )
    _add_times(entries, seconds)
    after = machine.others(device)
    if after.get("other_bytes", 0) > machine.OTHERS:
        warnings.append(f"other processes took {after['other_bytes'] / 1e6:.0f} MB of the device while measuring")
    return {
        "schema": records.SCHEMA,
        "version": version,
        "status": "finished",
        "error": None,
        "run": {
            "experiment": experiment,
            "kind": "efficiency",
            "model": model["name"],
            "task": lengths.task,
            "protocol": protocol["name"],
            "scale": scale,
            "config_hash": identity(model, protocol, lengths, options, version),
        },
        "model": {"title": model["title"], "architecture": dict(model["architecture"]), "random_weights": True},
        "treatment": {
            **asdict(options),
            "optimizer": "AdamW, fused; SparseGrad and lazy MeProp: lazy Adam for the target matrices",
            "train": protocol["train"],
            "density": protocol["density"],
            "bases": "random orthogonal: speed does not depend on which orthogonal matrices they are",
            "kept": "all variants in memory" if together else "each variant built anew in every round",
            "order": "interleaved: every round runs all variants over all batches, every second round in reverse",
            "batches_at": "on the device before the clock starts",
        },
        "lengths": lengths.facts() | shapes,
        "device": machine.facts(device) | {"others_before": before, "others_after": after},
        "warnings": warnings,
        "variants": entries,
        "provenance": records.provenance(),
    }


def identity(
    model: Mapping[str, Any],
    protocol: Mapping[str, Any],
    lengths: Lengths,
    options: EfficiencyOptions,
    version: int,
) -> str:
    """Hash of what decides the numbers, the machine and the forms that exist among it, so that a record is reused."""
    device = machine.find_device(options.device)
    facts = machine.facts(device)
    read = ("density", "orientation", "train", "frozen", "lora_scale", "meprop_optimizer")
    content = {
        "version": version,
        "model": {k: model[k] for k in ("architecture", "target_modules", "layers_to_transform", "lora_rank", "k")},
        "protocol": {name: protocol[name] for name in read},
        "lengths": lengths.facts()["sha256"],
        "options": asdict(options),
        "device": [facts["type"], facts["name"]],
        "torch": torch.__version__,
        "variants": [asdict(variant) for variant in select_variants(options.variants)],
        "missing": [variant.name for variant in select_variants(options.variants) if why_missing(variant)],
    }
    return records.config_hash(content)


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


def _with_memory(
    entry: dict[str, Any],
    variant: Variant,
    make: Callable[[], Trainee],
    model: Mapping[str, Any],
    protocol: Mapping[str, Any],
    batches: Sequence[Batch],
    options: EfficiencyOptions,
    device: torch.device,
) -> dict[str, Any]:
    """Add parameters and memory to a variant's entry, or why it has none."""
    targets = build_targets(variant.method, model, protocol).find(
        make_model(model["architecture"], options.num_labels, "meta")
    )
    shapes = [tuple(target.module.weight.shape) for target in targets]
    kept = kept_entries(model["k"], protocol["density"], shapes[0])
    missing = why_missing(variant, shapes, kept)
    if missing:
        return _refused(entry, "skipped", missing)
    made: dict[str, Any] = {}

    def make_and_note() -> Trainee:
        trainee = make()
        made.update(parameters=trainee.parameters, method=trainee.method)
        return trainee

    log.info("memory of %s", variant.name)
    how = {"precision": options.precision, "device": device}
    try:
        take_workspaces(make, batches[0], **how)
        found = measure_memory(make_and_note, batches[0], **how, warmup_steps=options.warmup_steps)
    except torch.OutOfMemoryError as error:
        release(device)
        return _refused(entry, "failed", f"out of memory: {str(error).splitlines()[0]}")
    positions, width = batches[0]["input_ids"].numel(), 2 if options.precision == "bf16" else 4
    predicted = predicted_peaks(made["method"], found["components"], shapes, positions=positions, width=width)
    ratios = {name: value / found[name] for name, value in predicted.items()}
    shape = list(batches[0]["input_ids"].shape)
    entry["parameters"] = made["parameters"]
    entry["memory"] = found | {"predicted": predicted, "predicted_over_measured": ratios, "batch": shape}
    return entry


def _refused(entry: dict[str, Any], status: str, reason: str) -> dict[str, Any]:
    log.warning("%s %s: %s", entry["name"], status, reason)
    entry.update(status=status, reason=reason)
    return entry


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
