"""Any adapter that PEFT puts on linear layers, on the MLP matrices; what is not wrapped trains as in other methods.

``config`` names a configuration class of the installed PEFT, ``arguments`` are its own. Classes of LoRA's family take
rank and scale from model and protocol unless ``arguments`` says otherwise, so that DoRA is LoRA with one more switch.
What such a matrix trains and computes is counted on one that PEFT wraps, so that no adapter needs a formula here.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Self

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.methods.base import Configuration, Method
from finetune.methods.costs import Operations, Shape


@dataclass(frozen=True)
class PEFT(Method):
    """See :class:`finetune.methods.base.Method`.

    Attributes:
        config: name of the class.
        arguments: of it; ``target_modules`` are set from the targets.
    """

    config: str
    arguments: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Configuration) -> Self:
        name = config.method.get("config", "LoraConfig")
        given = dict(config.method.get("arguments", {}))
        if issubclass(_config_class(name), peft.LoraConfig):
            given = _lora_arguments(config) | given
        return cls(config.targets, name, given)

    def prepare(self, model: nn.Module) -> nn.Module:
        targets = self.targets.set_trainable(model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        wrapped = {target.name for target in targets}
        self._check_rank(min(min(target.shape) for target in targets))
        # Full names, not suffixes: it must wrap exactly the matrices that SparseGrad wraps.
        model = wrap(model, self.config, self.arguments, sorted(wrapped))
        for name, parameter in model.get_base_model().named_parameters():
            plain = name.replace(".base_layer.", ".")
            if plain in trained and plain.removesuffix(".weight") not in wrapped:
                parameter.requires_grad_(True)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload()

    def entries(self, shape: Shape) -> int:
        return sum(p.numel() for p in self._alone(shape).parameters() if p.requires_grad)

    def operations(self, shape: Shape) -> Operations:
        layer = self._alone(shape)
        few, more = (_operations(layer, shape, tokens) for tokens in (2, 4))
        return Operations((more - few) / 2, 2 * few - more)

    def backward_bytes(self, shape: Shape, positions: int, width: int) -> int:
        return super().backward_bytes(shape, positions, width) + positions * width * min(shape)  # the adapter's share

    def evaluation_bytes(self, shape: Shape, positions: int, width: int) -> int:
        return super().evaluation_bytes(shape, positions, width) + positions * width * max(shape)

    def _alone(self, shape: Shape) -> nn.Module:
        return _wrapped_alone(self.config, json.dumps(dict(self.arguments), sort_keys=True), shape)

    def _check_rank(self, limit: int) -> None:
        if issubclass(_config_class(self.config), peft.LoraConfig) and not 1 <= (rank := self.arguments["r"]) <= limit:
            raise ValueError(f"lora_rank={rank}; allowed: 1 to {limit} for these matrices.")


def wrap(model: nn.Module, config: str, arguments: Mapping[str, Any], names: Sequence[str]) -> nn.Module:
    """The model with an adapter on the layers of these names, and nothing but adapters trainable.

    Raises:
        ValueError: if PEFT refuses the arguments or the layers, or what it wraps can't be merged.
    """
    made = _config_class(config)
    try:
        wrapped = peft.get_peft_model(model, made(**arguments, target_modules=list(names)))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"peft's {config} with {dict(arguments)} refuses these matrices: {text}") from None
    found = {name for name, m in wrapped.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}
    if found != set(names):
        raise ValueError(f"peft's {config} wraps {len(found)} of {len(names)} matrices: it is for other layers.")
    if not hasattr(wrapped.base_model, "merge_and_unload"):
        raise ValueError(f"peft's {config} can't be merged into the weights, so it gives no plain model.")
    return wrapped


def lora_alpha(scale: str | float, rank: int) -> float:
    """PEFT's alpha for ``protocol.lora_scale``, which is alpha / rank (D12).

    Raises:
        ValueError: if the scale is neither ``inverse_rank`` nor a positive number.
    """
    if scale == "inverse_rank":
        return 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise ValueError(f"protocol.lora_scale={scale!r}; allowed: inverse_rank, or a positive number (alpha / rank).")
    return scale * rank


def _lora_arguments(config: Configuration) -> dict[str, Any]:
    """Rank by the model (7 for base models, 10 for large ones, 32 for LLaMa-2: section 4), scale by the protocol."""
    rank = config.method.get("arguments", {}).get("r", config.model["lora_rank"])
    dropout = config.protocol.get("lora_dropout", config.method.get("dropout", 0.0))
    return {"r": rank, "lora_alpha": lora_alpha(config.protocol["lora_scale"], rank), "lora_dropout": dropout}


def _config_class(name: str) -> type[peft.PeftConfig]:
    """A configuration class of the installed PEFT that wraps layers.

    Raises:
        ValueError: if there is none of that name.
    """
    wraps = {
        found.__name__: found
        for found in vars(peft).values()
        if isinstance(found, type)
        and issubclass(found, peft.PeftConfig)
        and "target_modules" in {field.name for field in fields(found)}
    }
    if name not in wraps:
        raise ValueError(
            f"method.config={name!r}; peft {peft.__version__} wraps layers by: {', '.join(sorted(wraps))}."
        )
    return wraps[name]


@lru_cache(maxsize=32)
def _wrapped_alone(config: str, arguments: str, shape: Shape) -> nn.Module:
    """One wrapped matrix without memory; real zeros for adapters that must look at values."""
    for device in ("meta", "cpu"):
        with torch.device(device):
            alone = nn.Sequential(OrderedDict(target=nn.Linear(shape[1], shape[0], bias=False))).requires_grad_(False)
            try:
                return wrap(alone, config, json.loads(arguments), ["target"])
            except ValueError:
                if device == "cpu":
                    raise
    raise AssertionError


def _operations(layer: nn.Module, shape: Shape, tokens: int) -> float:
    """Operations of forward and backward pass beyond the plain product and its input's gradient."""
    device = next(layer.parameters()).device
    x = torch.empty(tokens, shape[1], device=device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        y.backward(torch.empty_like(y))
    return float(counter.get_total_flops() - 4 * tokens * shape[0] * shape[1])
