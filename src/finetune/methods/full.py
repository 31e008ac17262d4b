"""Full fine-tuning ("Regular FT"): every parameter in scope, torch's AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import nn

from finetune.methods.base import Configuration, Method
from finetune.methods.costs import Operations, Shape


@dataclass(frozen=True)
class FullFineTuning(Method):
    """See :class:`finetune.methods.base.Method`.

    Attributes:
        train_targets: without it the target matrices stay as they are, their biases not: the control that tells what
            training them by any method adds to training all the rest.
    """

    train_targets: bool = True

    @classmethod
    def from_config(cls, config: Configuration) -> Self:
        return cls(config.targets, train_targets=config.method.get("train_targets", True))

    def prepare(self, model: nn.Module) -> nn.Module:
        for target in self.targets.set_trainable(model):
            if not self.train_targets:
                target.weight.requires_grad_(False)
        return model

    def entries(self, shape: Shape) -> int:
        return super().entries(shape) if self.train_targets else 0

    def operations(self, shape: Shape) -> Operations:
        return super().operations(shape) if self.train_targets else Operations(0.0)
