"""SparseGrad's truncated form as a method of Hugging Face's peft.

import sparsegrad.peft                                  # makes the method known to peft
config = sparsegrad.peft.SparseGradConfig(target_modules=["up_proj", "down_proj"], bases="bases.safetensors")
model = peft.get_peft_model(model, config)              # then any optimizer, the Trainer, save_pretrained, ...

``PeftModel.from_pretrained`` finds the method once this module is imported. Nothing else of sparsegrad imports peft.
"""

from sparsegrad.peft.config import SparseGradConfig
from sparsegrad.peft.layer import Linear
from sparsegrad.peft.model import SparseGradModel
from sparsegrad.peft.register import SparseGradType, register

__all__ = ["Linear", "SparseGradConfig", "SparseGradModel", "SparseGradType", "register"]

register()
