"""Full fine-tuning ("Regular FT"): every parameter in scope, torch's AdamW."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer

from finetune.methods.base import Targets


@dataclass(frozen=True)
class FullFineTuning:
    """See :class:`finetune.methods.base.Method`.

    Attributes:
        train_targets: without it the target matrices stay as they are, their biases not: the control that tells what
            training them by any method adds to training all the rest.
    """

    targets: Targets
    train_targets: bool = True

    def prepare(self, model: nn.Module) -> nn.Module:
        for target in self.targets.set_trainable(model):
            if not self.train_targets:
                target.module.weight.requires_grad_(False)
        return model

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        return AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay, fused=True)

    def merge(self, model: nn.Module) -> nn.Module:
        return model

    def entries(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1] if self.train_targets else 0
