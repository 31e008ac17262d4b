"""Looking at a model's gradients without touching it: a copy is differentiated, and one gradient is held at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from finetune.data.examples import Examples
from finetune.energy.measures import Concentration, MeasureOptions, average, measure, pool
from finetune.energy.spaces import SPACES, rotations
from finetune.methods import Method
from finetune.methods.base import kept_entries
from finetune.training.gradients import PreliminaryOptions, collect
from finetune.training.losses import summed_loss
from sparsegrad import Basis, Target, core_shape, random_basis


@dataclass(frozen=True)
class Rows:
    """Some rows of a split, as a split of their own."""

    split: Examples
    rows: Sequence[int]

    @property
    def sha256(self) -> str:
        return self.split.sha256

    @property
    def largest_id(self) -> int:
        return self.split.largest_id

    @property
    def content(self) -> str:
        return self.split.content

    @property
    def longest(self) -> int:
        return self.split.longest

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self.split.batch([self.rows[index] for index in indices])

    def targets(self, indices: Sequence[int]) -> int:
        return self.split.targets([self.rows[index] for index in indices])


@dataclass
class Probe:
    """What every look at a model shares.

    Attributes:
        method: prepared the model; it knows the targets and gives the plain model.
        judged: batches whose gradients are measured, lists of rows of ``split``.
        refreshing: rows that refreshed bases are made from, disjoint from the judged.
        stored: bases of the basis stage, by layer kind.
        options: what is measured.
        budget: ``k`` and ``density`` (D1), of the leading block.
        batch_size, refresh_batches: of the refreshed bases.
        seed: of dropout, of the random bases.
        picture: rows and columns of a heat map.
    """

    method: Method
    split: Examples
    judged: Sequence[Sequence[int]]
    refreshing: Sequence[int]
    stored: Mapping[str, Basis]
    options: MeasureOptions
    budget: tuple[int | None, float | None]
    batch_size: int
    refresh_batches: int
    seed: int
    picture: tuple[int, int]
    _bases: dict[str, dict[str, Basis]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.judged:
            raise ValueError("no batch to judge gradients on; raise scale.batches.")
        if set(self.refreshing) & {row for rows in self.judged for row in rows}:
            raise ValueError("rows of the refreshed basis are judged too; it must be judged on others.")
        generator = torch.Generator().manual_seed(self.seed)
        drawn = {kind: random_basis(basis, generator) for kind, basis in self.stored.items()}
        self._bases = {"stored": dict(self.stored), "random": drawn}

    def ranks(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the truncated form's core of a matrix."""
        return core_shape(kept_entries(*self.budget, shape), shape)

    def look(self, model: nn.Module, device: torch.device, pictures: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Measure the gradients of a model as it is now. The first call's refreshed basis stays as the initial one.

        Args:
            model: prepared by the method; a copy is differentiated, in float32 and training mode (dropout is on, as in
                the gradients that fine-tuning sees).
            pictures: make heat maps, of the first judged batch.

        Returns:
            Numbers for the record, and heat maps by name: ``<space>.<kind>.<block>`` of the middle block's weight
            gradients, in all spaces but the random, and ``output.<original|initial>.<kind>.<block>`` of the middle's
            and the last's output gradients.

        Raises:
            ValueError: if a gradient is zero or not finite.
        """
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            # Mixed precision wraps forward; without the wrapper the copy computes in float32.
            plain = extract_model_from_parallel(copy.deepcopy(model), keep_fp32_wrapper=False)
            plain = self.method.merge(plain).to(device).train()
            options = PreliminaryOptions(steps=self.refresh_batches, batch_size=self.batch_size)
            rows, targets = Rows(self.split, self.refreshing), self.method.targets
            collected = collect(plain, rows, targets, options, seed=self.seed, device=device, progress_bar=False)
            refreshed = {kind: basis.to(dtype=torch.float32) for kind, basis in collected.bases().items()}
            if "initial" not in self._bases:
                released = {kind: basis.oriented("released") for kind, basis in refreshed.items()}
                self._bases |= {"initial": refreshed, "released": released}
            gradients = _Gradients(self, plain, self._bases | {"refreshed": refreshed})
            torch.manual_seed(self.seed)
            loss = 0.0
            for number, rows in enumerate(self.judged):
                loss += gradients.judge(rows, device, pictures and number == 0) / len(self.judged)
        numbers = gradients.numbers() | {"loss": loss, "refreshed_with": collected.facts["gradients"]}
        return numbers, gradients.pictures


class _Gradients:
    """Hooks on a throwaway model that measure each gradient as it comes and free it."""

    def __init__(self, probe: Probe, plain: nn.Module, bases: Mapping[str, Mapping[str, Basis]]) -> None:
        self.probe, self.plain, self.bases = probe, plain, bases
        self.targets = probe.method.targets.find(plain)
        self.weight: dict[tuple[str, str], list[Concentration]] = {}
        self.output: dict[str, list[dict[str, float]]] = {}
        self.pictures: dict[str, Tensor] = {}
        self._draw, self._padding = False, torch.empty(0)
        blocks = sorted({target.layer for target in self.targets if target.layer is not None})
        self._middle = blocks[(len(blocks) - 1) // 2] if blocks else None  # BERT's fifth, the paper's example
        self._last = blocks[-1] if blocks else None
        for parameter in plain.parameters():
            parameter.requires_grad_(False)
        for target in self.targets:
            target.weight.requires_grad_(True)
            target.weight.register_post_accumulate_grad_hook(self._weight_hook(target))
            target.module.register_forward_hook(self._output_hook(target))

    def judge(self, rows: Sequence[int], device: torch.device, draw: bool) -> float:
        """Differentiate the mean loss of a batch; the hooks measure. Returns the loss."""
        batch = {name: tensor.to(device) for name, tensor in self.probe.split.batch(rows).items()}
        labels = batch.pop("labels")
        self._draw, self._padding = draw, batch["attention_mask"].flatten() == 0
        if draw:
            self.pictures["padding"] = self._padding.to(torch.uint8).cpu()[: self.probe.picture[0]]
        loss = summed_loss(self.plain(**batch).logits, labels) / max(1, self.probe.split.targets(rows))
        loss.backward()
        return float(loss.detach())

    def numbers(self) -> dict[str, Any]:
        """Means over the judged batches: ``spaces`` by space, and ``output_gradients``, lists over the targets."""
        return {
            "spaces": {space: [average(self.weight[space, t.name]) for t in self.targets] for space in SPACES},
            "output_gradients": [_mean(self.output[target.name]) for target in self.targets],
        }

    def _weight_hook(self, target: Target) -> Any:
        ranks = self.probe.ranks(target.shape)

        def take(weight: Tensor) -> None:
            for space, G in rotations(weight.grad, self.bases, target.kind).items():
                self.weight.setdefault((space, target.name), []).append(measure(G, ranks, self.probe.options))
                if self._draw and target.layer == self._middle and space != "random":  # noise has nothing to show
                    name = f"{space}.{target.kind}.{target.layer}"
                    self.pictures[name] = pool(G, *self.probe.picture)
            weight.grad = None

        return take

    def _output_hook(self, target: Target) -> Any:
        V = self.bases["initial"][target.kind].V

        def take(gradient: Tensor) -> None:
            g = gradient.flatten(0, -2)  # (tokens, out_features)
            rotated = g @ V.T
            self.output.setdefault(target.name, []).append(self._output_numbers(g, rotated))
            if self._draw and target.layer in (self._middle, self._last):
                rows, columns = self.probe.picture
                for space, values in (("original", g), ("initial", rotated)):
                    name = f"output.{space}.{target.kind}.{target.layer}"
                    self.pictures[name] = pool(values[:rows], rows, columns)

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.register_hook(take)

        return hook

    def _output_numbers(self, g: Tensor, rotated: Tensor) -> dict[str, float]:
        """Shares of one output gradient; the rotation keeps which rows, one a token, are zero."""
        empty, padding = (g == 0).all(dim=1), self._padding
        found = {
            "tokens": float(len(g)),
            "padding": float(padding.double().mean()),
            "zero_rows": float(empty.double().mean()),
            "zero_rows_padding": float((empty & padding).double().mean()),
            "nonzero": float((g != 0).double().mean()),
        }
        level = self.probe.options.levels[0]
        for name, values in (("large_original", g), ("large_initial", rotated)):
            size = values.abs()
            found[name] = float((size >= level * size.max()).double().mean())
        return found


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(f"{sum(one[name] for one in found) / len(found):.5g}") for name in found[0]}
