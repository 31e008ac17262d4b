"""Entries that are drawn, not chosen, in the weight's own space: the control for every way of choosing them.

As many entries of each target matrix as SparseGrad keeps, under the same lazy Adam. Drawn once, they are those of a
sparse adapter with a random mask (SpaRTA, arXiv 2502.15975; SHiRA, arXiv 2406.13175); redrawn, a step moves others.
What is drawn follows from the seed, the matrix and the step alone, so a run that goes on draws what it would have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.methods.base import Configuration
from finetune.methods.costs import MatrixMemory, Shape
from finetune.methods.meprop import MeProp
from sparsegrad import SparseGradAdamW, param_groups, sparsegrad_layers


@dataclass(frozen=True)
class RandomEntries(MeProp):
    """See :class:`finetune.methods.base.Method`.

    Attributes:
        redraw: whether every step draws anew.
        seed: of what is drawn.
    """

    optimizer_rule: str = "lazy_adam"
    redraw: bool = False
    seed: int = 0

    @classmethod
    def from_config(cls, config: Configuration) -> Self:
        own = {"redraw": config.method.get("redraw", False), "seed": config.seed}
        return cls(config.targets, config.model["k"], config.protocol["density"], **own)

    def prepare(self, model: nn.Module) -> nn.Module:
        model = super().prepare(model)
        for number, layer in enumerate(sparsegrad_layers(model).values()):
            layer.rule = Drawn((self.seed, number))
        return model

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        # Redrawn, nearly all entries are touched in the end: what searches nothing is smaller then, and faster.
        moments = "dense" if self.redraw else "compact"
        optimizer = SparseGradAdamW(param_groups(model, weight_decay), lr=lr, fused=True, moments=moments)
        if self.redraw:
            rules = [cast(Drawn, layer.rule) for layer in sparsegrad_layers(model).values()]
            optimizer.param_groups[-1]["draws"] = 0  # in its state, so that a checkpoint holds it
            optimizer.register_step_post_hook(lambda own, *_: _advance(own, rules, 1))
            optimizer.register_load_state_dict_post_hook(lambda own: _advance(own, rules, 0))
        return optimizer

    def memory(self, shape: Shape, touched: float = 0.0) -> MatrixMemory:
        """One matrix after the other; moments of the drawn entries alone, or of all with a mark each."""
        whole = shape[0] * shape[1]
        found = super().memory(shape, min(touched, self.entries(shape) / whole))
        return replace(found, state=9 * whole if self.redraw else found.state, together=1)


class Drawn:
    """A rule of :func:`sparsegrad.sparsify` that does not look at the gradient.

    Args:
        seed: whole numbers, none negative.

    Attributes:
        draw: number of the draw.
    """

    def __init__(self, seed: tuple[int, ...]) -> None:
        self.seed, self.draw = seed, 0
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, gradient: Tensor, k: int) -> Tensor:
        """Flat indices int64 ``(k,)``, ascending, uniform over all sets of k entries; on the CPU."""
        key = (*self.seed, self.draw, k, gradient.numel())
        if key not in self._kept:
            chosen = np.random.default_rng(key[:-2]).choice(gradient.numel(), k, replace=False, shuffle=False)
            self._kept = {key: torch.from_numpy(np.sort(chosen))}
        return self._kept[key]


def _advance(optimizer: Any, rules: list[Drawn], steps: int) -> None:
    """Let the next step use the draw after so many steps more than the optimizer has noted."""
    group = optimizer.param_groups[-1]
    group["draws"] += steps
    for rule in rules:
        rule.draw = group["draws"]
