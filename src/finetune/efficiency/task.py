"""One record: all variants of one model on batches of one task's lengths."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from finetune import models
from finetune.efficiency.lengths import PADDINGS, Lengths, make_batches
from finetune.efficiency.stage import Stage
from finetune.efficiency.timing import Batch, ratio, release, summarise, time_variants
from finetune.efficiency.variant_memory import KEEPS, Kept, MemoryOf
from finetune.efficiency.variants import (
    PRECISIONS,
    Build,
    Trainee,
    is_decoder,
    make_model,
    make_trainee,
    random_bases,
    select_variants,
    settle,
)
from finetune.training.capture import MODES

log = logging.getLogger(__name__)


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
        graphs: ``auto`` runs passes from CUDA graphs, token lengths rounded up, where it can; ``off`` runs none.
        checkpointing: gradient checkpointing of every block.

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
    graphs: str = "off"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        whole = dict.fromkeys(("batch_size", "batches", "rounds", "warmup_steps", "max_length", "num_labels"), 1)
        for name, least in (whole | {"threads": 1, "seed": 0}).items():
            value = getattr(self, name)
            if (value is None and name == "threads") or (type(value) is int and value >= least):
                continue
            raise ValueError(f"{name}={value!r}; it must be a whole number, at least {least}.")
        choices = {"padding": PADDINGS, "precision": tuple(PRECISIONS), "keep": KEEPS, "graphs": MODES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}.")
        select_variants(self.variants)

    def content(self) -> dict[str, Any]:
        """For the identity: what came later than committed records is in it where it is not the default."""
        later = {"graphs": "off", "checkpointing": False}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}

    def build(self, device: torch.device) -> Build:
        """How the variants are built."""
        own = ("num_labels", "learning_rate", "precision", "seed", "graphs", "checkpointing")
        return Build(device, **{name: getattr(self, name) for name in own})


def measure_task(
    model: Mapping[str, Any], protocol: Mapping[str, Any], lengths: Lengths, options: EfficiencyOptions, stage: Stage
) -> dict[str, Any]:
    """Measure all variants on one task and write the record, or read it where it is finished.

    Args:
        model: the configuration group: name, title, architecture, target_modules, layers_to_transform, lora_rank, k; a
            decoder's (it has a ``template``) is trained on all tokens but the first.
        protocol: the group; density, orientation, train, frozen, lora_scale and meprop_optimizer are read, of a
            decoder's gate, also_train, every_block and lora_dropout too.
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
    of_model = ("architecture", "target_modules", "layers_to_transform", "lora_rank", "k")
    read = ("density", "orientation", "train", "frozen", "lora_scale", "meprop_optimizer")
    if is_decoder(model):
        of_model, read = (*of_model, "template"), (*read, "gate", "also_train", "every_block", "lora_dropout")
    return {
        "model": {name: model[name] for name in of_model},
        "protocol": {name: protocol[name] for name in read},
        "lengths": lengths.facts()["sha256"],
        "options": options.content(),
        "variants": [variant.content() for variant in select_variants(options.variants)],
        "missing": [],  # in the hashes of committed records: forms that sparsegrad did not have
    }


def _measure(
    model: Mapping[str, Any],
    protocol: Mapping[str, Any],
    lengths: Lengths,
    options: EfficiencyOptions,
    device: torch.device,
) -> dict[str, Any]:
    started, build = time.monotonic(), options.build(device)
    batches, shapes = _batches(model, lengths, options, device)
    bases = random_bases(model, protocol, seed=options.seed, device=device)
    kept, entries, makers = Kept.on(device, options.keep), [], {}
    memory_of = MemoryOf(model, protocol, bases, build, batches[0], options.warmup_steps, kept)
    for variant in select_variants(options.variants):
        log.info("memory of %s", variant.name)
        entries.append(variant.content() | memory_of(variant))
        if entries[-1]["status"] == "finished":
            makers[variant.name] = partial(make_trainee, variant, model, protocol, bases, build)
    timed, together = time.monotonic(), kept.together
    log.info("times of %d variants", len(makers))
    _add_times(entries, makers, batches, options, kept)
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
    if options.graphs != "off":
        treatment["captured"] = "token lengths rounded up to multiples of 8; warm-up until all passes come from graphs"
    if is_decoder(model):
        treatment["stored"] = "float32 what is trained; under bf16 the rest in bfloat16"
    return {
        "model": {"title": model["title"], "architecture": dict(model["architecture"]), "random_weights": True},
        "treatment": treatment,
        "lengths": lengths.facts() | shapes,
        "variants": entries,
        "took_seconds": {"memory": timed - started, "times": time.monotonic() - timed},
    }


def _batches(
    model: Mapping[str, Any], lengths: Lengths, options: EfficiencyOptions, device: torch.device
) -> tuple[list[Batch], dict[str, Any]]:
    """Batches on the device, the longest first, so that warm-up meets the largest shapes."""
    plain = make_model(model, "meta", num_labels=options.num_labels)
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
    if is_decoder(model):  # every token is predicted from those before it
        made = [batch | {"labels": batch["input_ids"].where(batch["attention_mask"] > 0, -100)} for batch in made]
    order = sorted(range(len(made)), key=lambda place: -made[place]["input_ids"].shape[1])
    shapes["batches"] = [shapes["batches"][place] for place in order]
    return [{name: tensor.to(device) for name, tensor in made[place].items()} for place in order], shapes


def _add_times(
    entries: Sequence[dict[str, Any]],
    makers: Mapping[str, Callable[[], Trainee]],
    batches: Sequence[Batch],
    options: EfficiencyOptions,
    kept: Kept,
) -> None:
    """Time the variants; say of kept ones how many passes came from a graph, where graphs are asked for."""
    device, graphs = batches[0]["input_ids"].device, options.graphs != "off"
    how = {"rounds": options.rounds, "warmup_steps": options.warmup_steps, "together": kept.together}
    how |= {"device": device, "kept": kept.trainees, "settle": settle if graphs else None}
    release(device)  # what the last variant left, where none is kept
    seconds = time_variants(makers, batches, **how)
    for entry in entries:
        name = entry["name"]
        if name not in seconds:
            continue
        entry.update(summarise(seconds[name]))
        entry["seconds"] = seconds[name]
        if "full" in seconds:
            entry["ratio_to_full"] = ratio(seconds["full"], seconds[name])
        if graphs and name in kept.trainees:
            entry["captured_passes"] = kept.trainees[name].steps.captured
