"""Any adapter that PEFT puts on linear layers, on the MLP matrices; what is not wrapped trains as in other methods.

``config`` names a configuration class of the installed PEFT, ``arguments`` are its own. Classes of LoRA's family take
rank and scale from model and protocol unless ``arguments`` says otherwise, so that DoRA is LoRA with one more switch.
``match`` names the argument that sets an adapter's size: of each matrix it is what brings the trained numbers nearest
to SparseGrad's k, so that all methods have as many. What a matrix trains and computes is counted on one that PEFT
wraps (:mod:`finetune.methods.adapters`), so that no adapter needs a formula here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

import peft
from torch import nn

from finetune.methods import adapters
from finetune.methods.base import Configuration, Method, kept_entries
from finetune.methods.costs import Operations, Shape


@dataclass(frozen=True)
class Match:
    """The argument that is chosen by matrix, and what its trained numbers are to come near to.

    Attributes:
        name: of the argument: a whole number, with which the trained numbers grow.
        k, density: entries that a sparse method keeps of a matrix.
        lora_rank: of plain LoRA; as many numbers as it trains an adapter may, where it can't have fewer.
        lora_scale: for an adapter of LoRA's family whose alpha follows from its rank (:func:`lora_alpha`).
    """

    name: str
    k: int | None
    density: float | None
    lora_rank: int
    lora_scale: str | float | None = None

    def arguments(self, size: int) -> dict[str, Any]:
        """Those that follow from the size."""
        alpha = {} if self.lora_scale is None else {"lora_alpha": lora_alpha(self.lora_scale, size)}
        return {self.name: size} | alpha


@dataclass(frozen=True)
class PEFT(Method):
    """See :class:`finetune.methods.base.Method`.

    Attributes:
        config: name of the class.
        arguments: of it; ``target_modules`` are set from the targets.
        match: of the argument that is chosen by matrix.
        freeze: regular expressions searched in the names of the adapters' parameters: what they find stays as drawn.
    """

    config: str
    arguments: Mapping[str, Any]
    match: Match | None = None
    freeze: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Configuration) -> Self:
        method, name = config.method, config.method.get("config", "LoraConfig")
        given = dict(method.get("arguments", {}))
        of_lora = issubclass(adapters.config_class(name), peft.LoraConfig)
        match = _match(config, of_lora) if method.get("match") else None
        if of_lora:
            given = _lora_arguments(config) | given
        if method.get("seeded"):
            given[method["seeded"]] = config.seed
        return cls(config.targets, name, given, match, tuple(method.get("freeze", ())))

    def prepare(self, model: nn.Module) -> nn.Module:
        targets = self.targets.set_trainable(model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        wrapped = {target.name for target in targets}
        # Full names, not suffixes: it must wrap exactly the matrices that SparseGrad wraps.
        parts: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for target in sorted(targets, key=lambda target: target.name):
            arguments = self._arguments(target.shape)
            parts.setdefault(json.dumps(arguments), (arguments, []))[1].append(target.name)
        model = adapters.wrap(model, self.config, list(parts.values()), self.freeze)
        for name, parameter in model.get_base_model().named_parameters():
            plain = name.replace(".base_layer.", ".")
            if plain in trained and plain.removesuffix(".weight") not in wrapped:
                parameter.requires_grad_(True)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        for pattern in self.freeze:  # frozen, they may be stored lower than what they are multiplied with
            for name, parameter in model.named_parameters():
                if re.search(pattern, name):
                    parameter.data = parameter.data.float()
        return model.merge_and_unload()

    def entries(self, shape: Shape) -> int:
        return adapters.trained_numbers(self.config, self._arguments(shape), shape, self.freeze)

    def operations(self, shape: Shape) -> Operations:
        return adapters.operations(self.config, self._arguments(shape), shape, self.freeze)

    def backward_bytes(self, shape: Shape, positions: int, width: int) -> int:
        return super().backward_bytes(shape, positions, width) + positions * width * min(shape)  # the adapter's share

    def evaluation_bytes(self, shape: Shape, positions: int, width: int) -> int:
        return super().evaluation_bytes(shape, positions, width) + positions * width * max(shape)

    def _arguments(self, shape: Shape) -> dict[str, Any]:
        """Of a matrix of this shape.

        Raises:
            ValueError: if a rank of LoRA's family is out of range, or no size fits.
        """
        found = dict(self.arguments)
        if self.match is not None:
            found |= self.match.arguments(self._nearest_size(found, shape))
        if issubclass(adapters.config_class(self.config), peft.LoraConfig) and not 1 <= found["r"] <= min(shape):
            raise ValueError(f"lora_rank={found['r']}; allowed: 1 to {min(shape)} for these matrices.")
        return found

    def _nearest_size(self, given: Mapping[str, Any], shape: Shape) -> int:
        match = cast(Match, self.match)
        k, most = kept_entries(match.k, match.density, shape), match.lora_rank * sum(shape)

        def trained(size: int) -> int:
            return adapters.trained_numbers(self.config, {**given, **match.arguments(size)}, shape, self.freeze)

        size = adapters.nearest_size(trained, k, limit=shape[0] * shape[1])
        if not k / 2 <= (found := trained(size)) <= 2 * max(k, most):
            raise ValueError(
                f"method.match={match.name}: peft's {self.config} trains {found} numbers of a matrix of shape "
                f"{tuple(shape)} at {match.name}={size}, and no size comes nearer to k={k}: give "
                f"arguments.{match.name} in its place, or another density."
            )
        return size


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


def _match(config: Configuration, of_lora: bool) -> Match:
    method, protocol, rank = config.method, config.protocol, config.model["lora_rank"]
    own_alpha = "lora_alpha" in method.get("arguments", {})
    scale = protocol["lora_scale"] if of_lora and not own_alpha else None
    return Match(method["match"], config.model["k"], protocol["density"], rank, scale)
