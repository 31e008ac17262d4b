"""Which matrices of a model are meant, and how each lies in its module.

``target_modules`` is one of

- a dictionary, layer kind (``up``, ``down``, ``gate``) to a regular expression of the *whole* name; its group ``layer``
  is the block's index;
- a list of names' endings, as PEFT takes them: ``["up_proj", "down_proj"]``. Of BERT, ``output.dense`` takes the
  attention's too: 36 matrices instead of 24;
- one regular expression of the whole name;
- ``"all-mlp"``: the MLP's matrices by the model's type, from ``architectures.json``.

Matrices of one kind share a basis and so have one shape. A matrix is an ``nn.Linear``, a ``Conv1D`` of transformers
(GPT-2; it keeps its weight transposed), or one expert of a 3-D parameter ``(experts, out_features, in_features)``
(Mixtral), which the parameter's name finds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, cast

from torch import Tensor, nn

from sparsegrad.experts import ExpertList
from sparsegrad.linear import SparseGradLinear

TargetModules = Mapping[str, str] | Sequence[str] | str
ALL_MLP = "all-mlp"


@dataclass(frozen=True)
class Target:
    """One matrix to replace.

    Attributes:
        kind: whose basis it takes.
        layer: its block's index; None without a group ``layer``.
        name: of its module, in full; of an expert, that of the parameter and its number.
        module: that holds it.
        parameter: how the module calls it.
        expert: its number in a 3-D parameter, else None.
    """

    kind: str
    layer: int | None
    name: str
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None

    @property
    def weight(self) -> Tensor:
        """The parameter that it lies in, as the module keeps it."""
        return cast(Tensor, getattr(self.module, self.parameter))

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix, ``(out_features, in_features)``."""
        if self.expert is not None or is_transposed(self.module):
            rows, columns = self.matrix(self.weight.detach()).shape
            return rows, columns
        return cast(Any, self.module).out_features, cast(Any, self.module).in_features

    def matrix(self, tensor: Tensor) -> Tensor:
        """A view of the parameter, or of its gradient, as ``(out_features, in_features)``."""
        if self.expert is not None:
            return tensor[self.expert]
        return tensor.T if is_transposed(self.module) else tensor


def find_targets(
    model: nn.Module, target_modules: TargetModules, layers_to_transform: Sequence[int] | None = None
) -> list[Target]:
    """The matrices that are named, in model order.

    Args:
        model: any module.
        target_modules: see :mod:`sparsegrad.targets`.
        layers_to_transform: block indices to take; None takes all.

    Raises:
        ValueError: as :func:`resolve_targets`, and if a pattern matches nothing or something that is no linear layer,
            a block is missing, or the blocks leave a layer kind without any layer.
    """
    patterns = resolve_targets(model, target_modules)
    found = list(_matches(model, patterns))
    for kind, pattern in patterns.items():
        if not any(t.kind == kind for t in found):
            raise ValueError(f"target_modules.{kind}={pattern!r} matches no module in full. {_offer(model)}")
    if wrong := [t for t in found if t.expert is None and not is_linear(t.module)]:
        kinds = ", ".join(f"{t.name} ({type(t.module).__name__})" for t in wrong[:4])
        raise ValueError(
            f"target_modules must name linear layers, nn.Linear or Conv1D, or 3-D parameters of experts; these are "
            f"not: {kinds}."
        )
    return found if layers_to_transform is None else _of_blocks(found, layers_to_transform)


def resolve_targets(model: nn.Module, target_modules: TargetModules) -> dict[str, str]:
    """``target_modules`` as a dictionary, layer kind to regular expression, that names the same matrices.

    Of a list or a string, the kind is what follows the block's number in the name: ``mlp_up_proj``.

    Raises:
        ValueError: if nothing is given, an entry names nothing, a type of model is not in the table, or one kind has
            matrices of several shapes.
    """
    if isinstance(target_modules, Mapping) and target_modules:
        return dict(target_modules)
    if not target_modules or isinstance(target_modules, Mapping):
        raise ValueError(
            f"target_modules={target_modules!r}; give a dictionary of layer kinds and regular expressions, a list of "
            f"names' endings, one regular expression, or {ALL_MLP!r}."
        )
    if target_modules == ALL_MLP:
        patterns = _from_table(model)
    elif isinstance(target_modules, str):
        expression = _compiled(target_modules, "target_modules")
        patterns = _described(model, [name for name in _matrices(model) if expression.fullmatch(name)])
    else:
        patterns = _described(model, _ending(model, target_modules))
    if not patterns:
        raise ValueError(f"target_modules={target_modules!r} matches no module in full. {_offer(model)}")
    shapes: dict[str, set[tuple[int, int]]] = {}
    for target in _matches(model, patterns):
        shapes.setdefault(target.kind, set()).add(target.shape)
    if several := [f"{kind} {sorted(found)}" for kind, found in shapes.items() if len(found) > 1]:
        raise ValueError(
            f"target_modules={target_modules!r} puts matrices of several shapes in one layer kind, and they would "
            f"share one basis: {'; '.join(several[:4])}. Give a dictionary, layer kind to regular expression."
        )
    return patterns


def architectures() -> dict[str, dict[str, str]]:
    """The table of ``"all-mlp"``: type of model (``model.config.model_type``) to layer kind to regular expression."""
    return json.loads(files("sparsegrad").joinpath("architectures.json").read_text())


def kind_of(name: str) -> str:
    """The layer kind of a matrix that a list or string names: what follows the block's number, dots as underscores."""
    parts = name.split(".")
    return "_".join(parts[_block_at(parts) + 1 :])


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix that can be replaced, or has been."""
    return isinstance(module, nn.Linear | SparseGradLinear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a linear layer whose weight is ``(in_features, out_features)``."""
    nf, weight = getattr(module, "nf", None), getattr(module, "weight", None)
    return nf is not None and isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == nf


def _matches(model: nn.Module, patterns: Mapping[str, str]) -> Iterator[Target]:
    """Every module and expert that a pattern names, linear or not."""
    compiled = {kind: _compiled(pattern, f"target_modules.{kind}") for kind, pattern in patterns.items()}

    def match(name: str) -> tuple[str, int | None] | None:
        for kind, pattern in compiled.items():
            if found := pattern.fullmatch(name):
                index = found.groupdict().get("layer")
                return kind, None if index is None else int(index)
        return None

    for name, module in model.named_modules():
        if found := match(name):
            if isinstance(module, ExpertList):
                for number, layer in enumerate(module.layers):
                    yield Target(*found, f"{name}.{number}", layer)
            else:
                yield Target(*found, name, module)
        for parameter, weight in _of_experts(module):
            if found := match(whole := f"{name}.{parameter}"):
                for number in range(len(weight)):
                    yield Target(*found, f"{whole}.{number}", module, parameter, number)


def _of_experts(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that may hold experts' matrices."""
    return [(name, p) for name, p in module.named_parameters(recurse=False) if p.dim() == 3]


def _matrices(model: nn.Module) -> Iterator[str]:
    """Names of all that may be a target."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertList) or (is_linear(module) and not _in_experts(model, name)):
            yield name
        yield from (f"{name}.{parameter}" for parameter, _ in _of_experts(module))


def _in_experts(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), ExpertList)


def _ending(model: nn.Module, endings: Sequence[str]) -> list[str]:
    """Names that are, or end with, one of a list; each must find some."""
    every = list(_matrices(model))
    for ending in endings:
        if not isinstance(ending, str) or not any(f".{name}".endswith(f".{ending}") for name in every):
            raise ValueError(f"target_modules has {ending!r}, the end of no layer's name. {_offer(model)}")
    return [name for name in every if any(f".{name}".endswith(f".{ending}") for ending in endings)]


def _block_at(parts: Sequence[str]) -> int:
    """Where the block's number stands in the parts of a name; -1: nowhere."""
    return next((place for place, part in enumerate(parts[:-1]) if part.isdigit()), -1)


def _described(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Layer kinds and regular expressions that name these matrices and no others."""
    places: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    patterns: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        at = _block_at(parts)
        if at < 0:
            patterns[kind_of(name)] = re.escape(name)
        else:
            before, numbers = places.setdefault(".".join(parts[at + 1 :]), ({}, {}))
            before[re.escape("".join(f"{part}." for part in parts[:at]))] = None
            numbers[parts[at]] = None
    every = list(_matrices(model))
    for rest, (before, numbers) in places.items():
        prefix = next(iter(before)) if len(before) == 1 else f"(?:{'|'.join(before)})"
        pattern = rf"{prefix}(?P<layer>\d+)\.{re.escape(rest)}"
        if any(re.fullmatch(pattern, name) and name not in names for name in every):
            pattern = pattern.replace(r"\d+", "|".join(numbers), 1)
        patterns[rest.replace(".", "_")] = pattern
    taken = [name for name in every if any(re.fullmatch(pattern, name) for pattern in patterns.values())]
    if set(taken) != set(names):
        other = sorted(set(taken) ^ set(names))
        raise ValueError(
            f"target_modules differ from block to block ({', '.join(other[:4])}): give a dictionary, layer kind to "
            "regular expression."
        )
    return patterns


def _from_table(model: nn.Module) -> dict[str, str]:
    """What the table says of a model's type, without the kinds that this model has not (gated or plain, dense)."""
    kind, table = getattr(getattr(model, "config", None), "model_type", None), architectures()
    if kind not in table:
        raise ValueError(
            f"target_modules={ALL_MLP!r} knows no model of type {kind!r}; known: {', '.join(sorted(table))}. Give a "
            "dictionary, layer kind to regular expression, or a list of the layers' names or their ends."
        )
    found = {target.kind for target in _matches(model, table[kind])}
    return {kind: pattern for kind, pattern in table[kind].items() if kind in found}


def _of_blocks(found: Sequence[Target], layers_to_transform: Sequence[int]) -> list[Target]:
    if any(type(block) is not int for block in layers_to_transform):
        raise ValueError(f"layers_to_transform={list(layers_to_transform)}; blocks are whole numbers, from 0.")
    missing = sorted(set(layers_to_transform) - {t.layer for t in found})
    if missing:
        present = sorted({t.layer for t in found if t.layer is not None})
        raise ValueError(f"layers_to_transform names blocks {missing}; the model has {present or 'no block index'}.")
    kept = [t for t in found if t.layer in set(layers_to_transform)]
    left_out = sorted({t.kind for t in found} - {t.kind for t in kept})
    if left_out:
        raise ValueError(
            f"layers_to_transform={list(layers_to_transform)} leaves no layer of kind {', '.join(left_out)}: name "
            "blocks of that kind, with the group 'layer' in its pattern, or leave the kind out of target_modules."
        )
    return kept


def _compiled(pattern: str, name: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}={pattern!r} is no regular expression: {error}.") from None


def _offer(model: nn.Module) -> str:
    names = list(_matrices(model))
    return f"Linear layers of this model: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}."
