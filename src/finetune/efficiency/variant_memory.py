"""Memory of one variant after the other, and which of them stay for their times to be taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch

from finetune.efficiency import machine
from finetune.efficiency.footprint import measure_memory, take_workspaces
from finetune.efficiency.timing import Batch, release
from finetune.efficiency.variants import (
    Build,
    Trainee,
    Variant,
    is_decoder,
    make_method,
    make_model,
    make_trainee,
    why_missing,
)
from finetune.methods.base import count_parameters, kept_entries
from finetune.methods.costs import RESIDENT, predicted_peaks
from sparsegrad import Basis

log = logging.getLogger(__name__)

KEEPS = ("auto", "together", "each_round")
SPARE = 0.8  # share of the free memory that variants kept together may take


@dataclass
class Kept:
    """The variants that stay in memory between rounds: all of them, or none.

    Attributes:
        keep: ``together``, ``each_round``, or ``auto``: together if they fit.
        free: bytes that could be allocated before the first was built.
    """

    keep: str
    free: int
    trainees: dict[str, Trainee] = field(default_factory=dict)
    held: int = 0
    highest: int = 0

    @classmethod
    def on(cls, device: torch.device, keep: str) -> Self:
        """Nothing yet, on a device with all the memory that is free now."""
        return cls(keep, machine.free_memory(device))

    @property
    def together(self) -> bool:
        """Whether they stay, or would if one more as large as the largest so far came beside them."""
        return self.keep == "together" or (self.keep == "auto" and self.held + self.highest <= SPARE * self.free)

    def add(self, name: str, trainee: Trainee, memory: Mapping[str, Any]) -> None:
        """Keep a variant, or forget all where there is no room."""
        resident = sum(memory["components"][part] for part in RESIDENT)
        self.held += memory["reserved"] if trainee.steps.captured else resident
        self.highest = max(self.highest, memory["peak_training"])
        self.trainees[name] = trainee
        if not self.together:
            self.forget()

    def forget(self) -> None:
        """From now on each is built anew."""
        self.keep = "each_round"
        self.trainees.clear()


class MemoryOf:
    """Parameters and memory of one variant after the other, on the longest batch and by formula."""

    def __init__(
        self,
        model: Mapping[str, Any],
        protocol: Mapping[str, Any],
        bases: Mapping[str, Basis],
        build: Build,
        batch: Batch,
        warmup_steps: int,
        kept: Kept,
    ) -> None:
        self.model, self.protocol, self.bases, self.build = model, protocol, bases, build
        self.batch, self.kept, self._fresh = batch, kept, True
        self.warmup_steps = warmup_steps
        self.plain = make_model(model, "meta", num_labels=build.num_labels)

    def __call__(self, variant: Variant) -> dict[str, Any]:
        """What the record holds of a variant, or why there is none; the variant itself stays in ``kept``."""
        method = make_method(variant, self.model, self.protocol, self.bases)
        shapes = [target.shape for target in method.targets.find(self.plain)]
        missing = why_missing(variant, shapes, kept_entries(self.model["k"], self.protocol["density"], shapes[0]))
        if missing:
            return _refused(variant.name, "skipped", missing)
        try:
            found, trainee = self._measured(variant)
        except torch.OutOfMemoryError as error:
            release(self.build.device)
            return _refused(variant.name, "failed", f"out of memory: {str(error).splitlines()[0]}")
        self.kept.add(variant.name, trainee, found)
        memory = found | {"batch": list(self.batch["input_ids"].shape)}
        # In no formula are gradients of a decoder's logits, and those of weights that a graph holds all the time.
        if not is_decoder(self.model) and self.build.graphs == "off":
            width, positions = 2 if self.build.precision == "bf16" else 4, self.batch["input_ids"].numel()
            predicted = predicted_peaks(method, found["components"], shapes, positions=positions, width=width)
            memory["predicted"] = predicted
            memory["predicted_over_measured"] = {peak: value / found[peak] for peak, value in predicted.items()}
        parameters = count_parameters(self.plain, method)
        return {"status": "finished", "reason": None, "parameters": parameters, "memory": memory}

    def _measured(self, variant: Variant) -> tuple[dict[str, Any], Trainee]:
        make = partial(make_trainee, variant, self.model, self.protocol, self.bases, self.build)
        try:
            if self._fresh:
                take_workspaces(make, self.batch, self.build.device)
                self._fresh = False
            return measure_memory(make, self.batch, self.build, warmup_steps=self.warmup_steps)
        except torch.OutOfMemoryError:
            if not self.kept.trainees:
                raise
        self.kept.forget()  # alone it may fit
        release(self.build.device)
        return measure_memory(make, self.batch, self.build, warmup_steps=self.warmup_steps)


def _refused(name: str, status: str, reason: str) -> dict[str, Any]:
    log.warning("%s %s: %s", name, status, reason)
    return {"status": status, "reason": reason}
