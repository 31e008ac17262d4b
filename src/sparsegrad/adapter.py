"""Adapters: what fine-tuning changed of a base model, in one file.

Written is what differs from the plain model that :func:`sparsegrad.sparsify` was given, whoever changed it: entries in
rotated coordinates, or the whole weight of a layer that others have written to, and every other parameter and buffer
whose bits are not the base's. Of all that is not written, fingerprints are: an adapter fits one base model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.convert import FORMS, find_targets, kind_value, own_options, sparsegrad_layers, sparsify
from sparsegrad.core import CoreLinear
from sparsegrad.fingerprint import fingerprint, fingerprints
from sparsegrad.io import load_tensors, save_tensors
from sparsegrad.linear import SparseGradLinear
from sparsegrad.optim import SparseGradAdamW
from sparsegrad.quantized import QuantizedTruncatedLinear
from sparsegrad.select import check_k
from sparsegrad.selecting import SelectingLinear
from sparsegrad.truncated import TruncatedLinear


def save_adapter(
    path: str | Path, model: nn.Module, optimizer: SparseGradAdamW | None, sparsify_config: Mapping[str, Any]
) -> None:
    """Write what differs from the base model.

    Of a truncated layer that is the whole core, and its weight too once the basis was refreshed: what earlier bases
    have moved does not lie in the last one's block.

    Args:
        path: a ``.safetensors`` file.
        model: a sparsified model.
        optimizer: one that trained the model, or None. It is not asked: the layers know what any optimizer has moved.
        sparsify_config: the keyword arguments given to :func:`sparsegrad.sparsify` (without the bases, and without the
            rule of selection, which no loaded adapter needs).

    Raises:
        ValueError: if the arguments are not those that the model was made with.
    """
    layers = sparsegrad_layers(model)
    config = _checked_config(sparsify_config, model, layers)
    labels: dict[int, str] = {}
    bases: dict[str, str] = {}
    tensors = _others(model, layers)
    base = {name: found for name, found in _base(layers).items() if f"dense.{name}" not in tensors}
    for name, layer in layers.items():
        tensors |= {f"{what}.{name}": tensor for what, tensor in _changed(layer).items()}
        if f"weight.{name}" in tensors:
            base.pop(f"{name}.weight", None)
        if layer.basis is not None:
            label = labels.setdefault(id(layer.basis), f"basis{len(labels)}")
            tensors[f"{label}.U"], tensors[f"{label}.V"] = layer.basis.U, layer.basis.V
            bases[name] = label
    shapes = {name: [layer.out_features, layer.in_features] for name, layer in layers.items()}
    save_tensors(
        path, tensors, {"content": "adapter", "bases": bases, "shapes": shapes, "sparsify": config, "base": base}
    )


@torch.no_grad()
def load_adapter(path: str | Path, model: nn.Module) -> nn.Module:
    """Sparsify a base model as the adapter was, and put the adapter's values in.

    Args:
        path: written by :func:`save_adapter`.
        model: the base model that was fine-tuned, plain; changed in place.

    Returns:
        The same model, with SparseGrad layers; :func:`sparsegrad.merge` makes it plain.

    Raises:
        ValueError: if the file is damaged, or belongs to another architecture or another base model; the model is
            unchanged then.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("content") != "adapter":
        raise ValueError(f"{path} holds {metadata.get('content')!r}, not an adapter.")
    if missing := {"sparsify", "shapes", "bases", "base"} - metadata.keys():
        raise ValueError(
            f"{path} lacks {', '.join(sorted(missing))}: it is of an older version; save the adapter again."
        )
    config, state = metadata["sparsify"], model.state_dict()
    dense = {n.removeprefix("dense."): t for n, t in tensors.items() if n.startswith("dense.")}
    unknown = [n for n, t in dense.items() if n not in state or state[n].shape != t.shape]
    targets = find_targets(model, config["target_modules"], config.get("layers_to_transform"))
    shapes = {t.name: [t.module.out_features, t.module.in_features] for t in targets}
    unknown += [n for n in shapes | metadata["shapes"] if shapes.get(n) != metadata["shapes"].get(n)]
    if unknown:
        raise ValueError(
            f"{path} is an adapter of another architecture: {', '.join(unknown[:4])} do not fit this model."
        )
    now = fingerprints(model)
    if others := [name for name, found in metadata["base"].items() if now.get(name) != found]:
        raise ValueError(
            f"{path} is an adapter of another base model: {', '.join(others[:4])} {'...' if others[4:] else ''} differ "
            "from the weights that it was trained on, or are in another precision: load it on those."
        )
    kinds = {t.kind: metadata["bases"][t.name] for t in targets if t.name in metadata["bases"]}
    bases = {kind: Basis(tensors[f"{label}.U"], tensors[f"{label}.V"]) for kind, label in kinds.items()} or None
    if bases and config.get("form") == "truncated":  # the file holds the leading rows alone
        config = config | {"ranks": {kind: list(basis.ranks) for kind, basis in bases.items()}}
    sparsify(model, bases, **config)
    layers = sparsegrad_layers(model)
    for name, layer in layers.items():
        _put(layer, *(tensors.get(f"{what}.{name}") for what in ("weight", "indices", "values")))
    for name, tensor in model.state_dict().items():
        if (plain := _plain_name(name, layers)) in dense:
            tensor.copy_(dense[plain])
    return model


def _changed(layer: SparseGradLinear) -> dict[str, Tensor]:
    """What of a layer's weight may differ from the base: ``weight``, or ``values`` at ``indices`` or of the block."""
    layer.follow()
    if isinstance(layer, CoreLinear):
        whole = {"weight": layer.weight} if isinstance(layer, TruncatedLinear) and layer.moved is None else {}
        return whole | {"values": layer.rotated_weight().flatten()}
    if layer.moved is None:
        return {"weight": layer.original_weight()}
    return {"indices": layer.moved, "values": layer.rotated_weight().flatten()[layer.moved]}


def _put(layer: SparseGradLinear, weight: Tensor | None, indices: Tensor | None, values: Tensor | None) -> None:
    """What :func:`_changed` gave, into a layer of the base model."""
    if weight is not None and isinstance(layer, SelectingLinear):
        layer.set_original(weight)
    elif weight is not None and isinstance(layer, TruncatedLinear):
        layer.rebase(layer.basis)
        layer.weight.copy_(weight)
    if values is not None:
        current = layer.rotated_weight().flatten()
        places = torch.arange(len(values)) if indices is None else indices
        places = places.to(current.device)
        layer.add_(places, values.to(current) - current[places])


def _others(model: nn.Module, layers: Mapping[str, SparseGradLinear]) -> dict[str, Tensor]:
    """Parameters and buffers outside the layers' weights whose bits are not the base's, as ``dense.<plain name>``."""
    base = _base(layers)
    state = {_plain_name(name, layers): t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    return {f"dense.{n}": t for n, t in state.items() if n is not None and base.get(n) != fingerprint(t)}


def _base(layers: Mapping[str, SparseGradLinear]) -> Mapping[str, str]:
    return next(iter(layers.values())).base


def _plain_name(name: str, layers: Mapping[str, SparseGradLinear]) -> str | None:
    """How the plain model calls what a sparsified one has under a name; None for what layers hold of their own."""
    owner = next((n for n in _prefixes(name) if n in layers), None)
    if owner is None:
        return name
    rest = name.removeprefix(f"{owner}.")
    if isinstance(layers[owner], QuantizedTruncatedLinear):  # the plain linear is kept inside
        return f"{owner}.{rest.removeprefix('linear.')}" if rest.startswith("linear.") else None
    return name if rest == "bias" else None


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _checked_config(
    given: Mapping[str, Any], model: nn.Module, layers: Mapping[str, SparseGradLinear]
) -> dict[str, Any]:
    """The arguments as JSON, if :func:`load_adapter` will make these layers of them.

    Raises:
        ValueError: if not.
    """
    missing = [name for name in ("k", "target_modules") if name not in given]
    if missing:
        raise ValueError(f"sparsify_config lacks {', '.join(missing)}: give all that sparsify was given.")
    config = {name: _json(value, name) for name, value in given.items()}
    form = config.get("form", "folded")
    if form not in FORMS:
        raise ValueError(f"sparsify_config has form={form!r}; allowed: {', '.join(FORMS)}.")
    own_options(form, {name: value for name, value in config.items() if name not in signature(sparsify).parameters})
    targets = find_targets(model, config["target_modules"], config.get("layers_to_transform"))
    if {t.name for t in targets} != set(layers):
        other = sorted({t.name for t in targets} ^ set(layers))
        raise ValueError(
            f"sparsify_config and the model differ in {', '.join(other[:4])}: give what sparsify was given."
        )
    for target in targets:
        layer, k = layers[target.name], check_k(kind_value(config["k"], target.kind, "k"), target.shape)
        core = isinstance(layer, CoreLinear)
        if (form == "truncated") != core or not (core or isinstance(layer, FORMS[form])):
            raise ValueError(f"sparsify_config has form={form!r}; {target.name} is {type(layer).__name__}.")
        if k < prod(layer.ranks) if isinstance(layer, CoreLinear) else k != layer.k:
            raise ValueError(f"sparsify_config has k={k}; {target.name} is {layer}.")
    return config


def _json(value: Any, name: str) -> Any:
    """A value as JSON keeps it: tuples and ranges as lists.

    Raises:
        ValueError: if it is none that JSON knows.
    """
    if isinstance(value, Mapping):
        return {str(key): _json(item, name) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_json(item, name) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"sparsify_config has {name}={value!r}, which no file can hold: leave out bases and select.")
