"""What a method is, and what all methods share: the matrices they target and the parameters around them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn
from torch.optim import Optimizer

from sparsegrad import Target, entries_for_density, find_targets
from sparsegrad.select import check_k

SCOPES = ("all", "mlp", "targets")


class Method(Protocol):
    """Three verbs, and one number for the tables."""

    targets: Targets

    def prepare(self, model: nn.Module) -> nn.Module:
        """Make the model trainable by this method, in place; its function does not change."""

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        """One optimizer that holds every trainable parameter in exactly one group."""

    def merge(self, model: nn.Module) -> nn.Module:
        """A plain model of the same function."""

    def entries(self, shape: tuple[int, int]) -> int:
        """Trained numbers of one target matrix ``(out_features, in_features)``: what the tables call its trainables."""


@dataclass(frozen=True)
class Targets:
    """The matrices that a method treats in its own way, and which parameters train around them.

    Attributes:
        target_modules: layer kind to regular expression (see :func:`sparsegrad.find_targets`).
        layers_to_transform: block indices, or None for all.
        scope: ``all`` trains everything else too, as the paper does for GLUE (D-section 2: LoRA leaves only the wrapped
            weights frozen); ``mlp`` trains the target layers and the classification head alone; ``targets`` trains the
            target layers and nothing else, as the paper does for LLaMa-2.
        frozen: regular expressions searched in parameter names; what they find is not trained.
        also_train: layer kind to regular expression, as ``target_modules``: layers of the same blocks that train as a
            whole whatever the method (D17, D19: gate_proj).
    """

    target_modules: Mapping[str, str]
    layers_to_transform: Sequence[int] | None = None
    scope: str = "all"
    frozen: tuple[str, ...] = ()
    also_train: Mapping[str, str] = field(default_factory=dict)

    def find(self, model: nn.Module) -> list[Target]:
        """The target layers of a model; ValueError if a pattern matches nothing."""
        return find_targets(model, self.target_modules, self.layers_to_transform)

    def set_trainable(self, model: nn.Module) -> list[Target]:
        """Set ``requires_grad`` of a plain model by scope and frozen patterns; returns the targets.

        Raises:
            ValueError: on an unknown scope, or a frozen pattern that finds nothing.
        """
        if self.scope not in SCOPES:
            raise ValueError(f"protocol.train={self.scope!r}; allowed: {', '.join(SCOPES)}.")
        targets = self.find(model)
        prefix = f"{model.base_model_prefix}."
        others = find_targets(model, self.also_train, self.layers_to_transform) if self.also_train else []
        inside = tuple(f"{target.name}." for target in (*targets, *others))
        for name, parameter in model.named_parameters():
            head = self.scope == "mlp" and not name.startswith(prefix)
            parameter.requires_grad_(self.scope == "all" or head or name.startswith(inside))
        for pattern in self.frozen:
            found = [p for n, p in model.named_parameters() if re.search(pattern, n)]
            if not found:
                raise ValueError(f"protocol.frozen has {pattern!r}, which finds no parameter of this model.")
            for parameter in found:
                parameter.requires_grad_(False)
        return targets


def kept_entries(k: int | None, density: float | None, shape: tuple[int, int]) -> int:
    """Entries kept of a matrix: a density wins over the model's k.

    Raises:
        ValueError: if neither is given, or what is given is out of range.
    """
    if density is not None:
        return entries_for_density(density, shape)
    if k is None:
        raise ValueError("set protocol.density (a share of the entries) or model.k (a number of entries).")
    return check_k(k, shape)
