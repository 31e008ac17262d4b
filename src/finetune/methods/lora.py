"""LoRA on the MLP matrices: PEFT's, with its costs by formula."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.methods.costs import Operations, Shape
from finetune.methods.peft import PEFT


@dataclass(frozen=True)
class LoRA(PEFT):
    """See :class:`finetune.methods.base.Method`.

    ``arguments`` holds the rank r, ``lora_alpha`` (the update is scaled by alpha / r; alpha 1 is the released code's
    1 / r, D12) and ``lora_dropout`` on the adapter's input, 0 in the released code.
    """

    config: str = "LoraConfig"
    arguments: dict[str, Any] = field(default_factory=dict)

    def entries(self, shape: Shape) -> int:
        return self._arguments(shape)["r"] * (shape[0] + shape[1])

    def operations(self, shape: Shape) -> Operations:
        return Operations(6.0 * self.entries(shape))  # and no gradient of the frozen weight
