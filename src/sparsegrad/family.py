"""Layers that share one key space of lazy Adam's moments, and their states one by one, as checkpoints hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from sparsegrad.linear import SparseGradLinear
from sparsegrad.state import Moments

Make = Callable[[int, int, int, Tensor], "Moments"]  # layers, entries of each, keys of a step; like a tensor


def family_key(group: int, layer: SparseGradLinear) -> tuple[object, ...]:
    """Layers of one parameter group, kind and shape are of one family."""
    return group, layer.kind, layer.rotated_shape


class Family:
    """Layers whose gradients have one shape, their step counts, and the moments that they share.

    Attributes:
        numbers: of the layers' parameters in the key space.
        entries, kept: of a gradient; of all gradients of a step.
        moments: None before the first step.
        steps: that each layer has taken, float64 ``(layers, 1)``, where the moments are.
    """

    def __init__(self) -> None:
        self.numbers: dict[Tensor, int] = {}
        self.entries = self.kept = 0
        self.moments: Moments | None = None
        self.steps = torch.empty(0)
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def add(self, layer: SparseGradLinear) -> None:
        """Add a layer: before the first step."""
        self.numbers[layer.trained] = len(self.numbers)
        self.entries = prod(layer.rotated_shape)
        self.kept += layer.k

    def made(self, make: Make, like: Tensor) -> Moments:
        """The moments, made where there are none yet."""
        if self.moments is None:
            self.moments = make(len(self.numbers), self.entries, self.kept, like)
            self.steps = torch.zeros(len(self.numbers), 1, dtype=torch.float64, device=like.device)
        return self.moments

    def rows(self, layers: Sequence[SparseGradLinear]) -> Tensor:
        """The layers' numbers, int64 ``(layers,)``, where the moments are."""
        numbers = tuple(self.numbers[layer.trained] for layer in layers)
        if numbers not in self._rows:  # once, since a graph can't wait for a copy from the host
            self._rows[numbers] = torch.tensor(numbers, device=self.steps.device)
        return self._rows[numbers]

    def export(self) -> dict[Tensor, dict[str, Tensor]]:
        """Of every parameter that was stepped: ``step``, ``indices``, ``exp_avg``, ``exp_avg_sq``; ``last``, a step."""
        found: dict[Tensor, dict[str, Tensor]] = {}
        for (parameter, number), step in zip(self.numbers.items(), self.steps.flatten().tolist(), strict=False):
            if self.moments is not None and step:
                own = self.moments.export(number)
                last = {"last": int(step) - own.pop("age")} if "age" in own else {}
                found[parameter] = {"step": torch.tensor(step, dtype=torch.float32), **own, **last}
        return found

    def load(self, saved: Mapping[Tensor, Mapping[str, Tensor]], make: Make) -> None:
        """Hold what :meth:`export` gave, and nothing of other parameters."""
        own = {self.numbers[parameter]: dict(tensors) for parameter, tensors in saved.items()}
        if own:
            self.made(make, next(iter(own.values()))["exp_avg"])
        self.steps.zero_()
        for number, tensors in own.items():
            self.steps[number] = step = int(tensors.pop("step"))
            if "last" in tensors:
                tensors["age"] = step - tensors.pop("last")
        if self.moments is not None:
            self.moments.load(own)
