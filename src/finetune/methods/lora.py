"""LoRA on the MLP matrices, through PEFT; what is not wrapped trains as in the other methods."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer

from finetune.methods.base import Targets


@dataclass(frozen=True)
class LoRA:
    """See :class:`finetune.methods.base.Method`.

    Attributes:
        rank: 7 for base models, 10 for large ones, 32 for LLaMa-2 (paper, section 4).
        alpha: the update is scaled by alpha / rank; alpha 1 is the released code's 1 / rank (D12).
        dropout: on the adapter's input; 0 in the released code.
    """

    targets: Targets
    rank: int
    alpha: float = 1.0
    dropout: float = 0.0

    def prepare(self, model: nn.Module) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        targets = self.targets.set_trainable(model)
        limit = min(min(target.module.weight.shape) for target in targets)
        if not 1 <= self.rank <= limit:
            raise ValueError(f"lora_rank={self.rank}; allowed: 1 to {limit} for these matrices.")
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        wrapped = {f"{target.name}.weight" for target in targets}
        # Full names, not suffixes: LoRA must wrap exactly the matrices that SparseGrad wraps.
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=[target.name for target in targets],
        )
        peft_model = get_peft_model(model, config)
        for name, parameter in peft_model.get_base_model().named_parameters():
            plain = name.replace(".base_layer.", ".")
            if plain in trained and plain not in wrapped:
                parameter.requires_grad_(True)
        return peft_model

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        return AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay, fused=True)

    def merge(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload()

    def entries(self, shape: tuple[int, int]) -> int:
        return self.rank * (shape[0] + shape[1])
