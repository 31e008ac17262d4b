"""MeProp as the paper compares it: the largest entries of the weight gradient, in the original space."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.methods.base import Configuration, Method, kept_entries
from finetune.methods.costs import MatrixMemory, Shape
from sparsegrad import NonFiniteGradient, SparseGradAdamW, foreach, merge, param_groups, sparsify
from sparsegrad.grouped import TOGETHER
from sparsegrad.select import top_k_of_each

RULES = ("adamw", "lazy_adam")


@dataclass(frozen=True)
class MeProp(Method):
    """See :class:`finetune.methods.base.Method`.

    Attributes:
        k: entries kept a matrix, the same count as SparseGrad's.
        density: a share instead of a count; wins over k.
        optimizer_rule: ``adamw``, as the released code: AdamW on the masked dense gradient, so that dropped entries
            go on moving by momentum (D11); ``lazy_adam``: SparseGrad's optimizer, so that the two methods differ in
            the basis alone.
    """

    k: int | None
    density: float | None = None
    optimizer_rule: str = "adamw"

    @classmethod
    def from_config(cls, config: Configuration) -> Self:
        protocol = config.protocol
        return cls(config.targets, config.model["k"], protocol["density"], protocol["meprop_optimizer"])

    def prepare(self, model: nn.Module) -> nn.Module:
        if self.optimizer_rule not in RULES:
            raise ValueError(f"protocol.meprop_optimizer={self.optimizer_rule!r}; allowed: {', '.join(RULES)}.")
        targets = self.targets.set_trainable(model)
        k = {t.kind: self.entries(t.shape) for t in targets}
        if self.optimizer_rule == "lazy_adam":
            sparsify(model, None, k, self.targets.target_modules, self.targets.layers_to_transform)
        return model

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        if self.optimizer_rule == "lazy_adam":
            return SparseGradAdamW(param_groups(model, weight_decay), lr=lr, fused=True)
        weights = [target.weight for target in self.targets.find(model)]
        optimizer = super().optimizer(model, lr, weight_decay)
        # Masked right before the step: after all micro-batches and ranks are summed.
        optimizer.register_step_pre_hook(lambda *_: self._mask(weights))
        return optimizer

    def merge(self, model: nn.Module) -> nn.Module:
        return merge(model)

    def entries(self, shape: Shape) -> int:
        return kept_entries(self.k, self.density, shape)

    def memory(self, shape: Shape, touched: float = 0.0) -> MatrixMemory:
        """Dense gradients; selecting, a stack of them, absolute values and a mask. Lazy Adam: as SparseGrad's."""
        k, whole = self.entries(shape), shape[0] * shape[1]
        held = max(k, round(touched * whole))
        room = k + max(2 * k, held // 4) if touched else 0
        lazy = self.optimizer_rule == "lazy_adam"
        state = 16 * (held + room) if lazy else 8 * whole
        selection = (5 if lazy else 9) * whole  # lazy Adam's gradients make room for their stack
        return MatrixMemory(4 * whole, state, selection, together=max(1, TOGETHER // whole))

    @torch.no_grad()
    def _mask(self, weights: Sequence[Tensor]) -> None:
        """Zero all but the largest entries of each gradient, those of one shape together.

        Raises:
            NonFiniteGradient: if one is not finite; no weight has moved then.
        """
        finite: list[Tensor] = []
        alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for weight in weights:
            if weight.grad is not None:
                alike[weight.shape].append(weight.grad)
        for (rows, columns), gradients in alike.items():
            size = max(1, TOGETHER // (rows * columns))
            for start in range(0, len(gradients), size):
                part = gradients[start : start + size]
                places, values, fine = top_k_of_each(torch.stack(part), self.entries((rows, columns)))
                finite.append(fine)
                foreach.zero_(part)
                for gradient, kept, entries in zip(part, places, values, strict=True):
                    gradient.view(-1).scatter_(0, kept, entries.to(gradient.dtype))
        if finite and not torch.cat(finite).all():  # the one wait for the device
            raise NonFiniteGradient
