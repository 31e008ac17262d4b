"""Adapters: what fine-tuning changed of a base model, in memory or in one file.

Held is what differs from the plain model that :func:`sparsegrad.sparsify` was given, whoever changed it: entries in
rotated coordinates, or the whole weight of a layer that others have written to, and every other parameter and buffer
whose bits are not the base's. Of all that is not held, fingerprints are: an adapter fits one base model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.changes import HELD, changed, fits, largest_differences, put
from sparsegrad.convert import kind_value, sparsegrad_layers, sparsify
from sparsegrad.fingerprint import fingerprint, fingerprints
from sparsegrad.io import load_bases, load_tensors, save_tensors
from sparsegrad.linear import SparseGradLinear
from sparsegrad.quantized import QuantizedTruncatedLinear
from sparsegrad.targets import Target, find_targets

BASES = ("inside", "reference")


@dataclass(frozen=True)
class AdapterState:
    """What an adapter holds.

    Attributes:
        tensors: on the CPU, of their own. Of a layer ``weight.<name>``, or ``values.<name>`` (``differences.<name>``)
            and, where not all are held, ``gaps.<name>`` between their places (:mod:`sparsegrad.gaps`);
            ``dense.<name>`` of anything else; ``basis.<kind>.U`` and ``.V``, unless they are referred to.
        metadata: JSON values: what sparsify was given, shapes, bases by their hashes, fingerprints of the base.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]


def save_adapter(
    path: str | Path,
    model: nn.Module,
    *,
    bases: str = "inside",
    differences_from: nn.Module | None = None,
    entries: int | None = None,
) -> None:
    """Write what differs from the base model.

    Args:
        path: a ``.safetensors`` file.
        model, bases, differences_from, entries: see :func:`adapter_state`.

    Raises:
        ValueError: as :func:`adapter_state`.
    """
    state = adapter_state(model, bases=bases, differences_from=differences_from, entries=entries)
    save_tensors(path, state.tensors, state.metadata)


def load_adapter(
    path: str | Path, model: nn.Module, *, bases: Mapping[str, Basis] | str | Path | None = None
) -> nn.Module:
    """Sparsify a base model as the adapter was, and put the adapter's values in.

    Args:
        path: written by :func:`save_adapter`.
        model: the base model that was fine-tuned, plain; changed in place.
        bases: of an adapter that refers to them: by layer kind, or a file of :func:`sparsegrad.save_bases`.

    Returns:
        The same model, with SparseGrad layers; :func:`sparsegrad.merge` makes it plain.

    Raises:
        ValueError: if the file is damaged, or as :func:`put_adapter`; the model is unchanged then.
    """
    state = read_adapter(path)
    given = load_bases(bases)[0] if isinstance(bases, str | Path) else bases
    try:
        return put_adapter(model, state, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_adapter(path: str | Path) -> AdapterState:
    """What :func:`save_adapter` wrote.

    Raises:
        ValueError: if the file is missing, damaged, or no adapter of this version.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("content") != "adapter":
        raise ValueError(f"{path} holds {metadata.get('content')!r}, not an adapter.")
    if missing := {"arguments", "shapes", "bases", "base"} - metadata.keys():
        raise ValueError(
            f"{path} lacks {', '.join(sorted(missing))}: it is of an older version; save the adapter again."
        )
    return AdapterState(tensors, metadata)


@torch.no_grad()
def adapter_state(
    model: nn.Module,
    *,
    bases: str = "inside",
    differences_from: nn.Module | None = None,
    entries: int | None = None,
) -> AdapterState:
    """What differs from the base model, exact unless ``differences_from`` is given.

    Of a truncated layer that is the whole core, and its weight too once the basis was refreshed: what earlier bases
    have moved does not lie in the last one's block.

    Args:
        model: a sparsified model.
        bases: ``inside``, or ``reference``: their hashes alone, so that whoever loads the adapter must give them.
        differences_from: the base model, plain. The adapter then holds differences from its weights in bfloat16, about
            3 bytes an entry; what each matrix loses of its difference, as a relative norm, stands in the metadata
            (``lost``). Not for the truncated form.
        entries: hold the largest differences of each matrix alone, this many at most.

    Raises:
        ValueError: if a word is unknown, this is not the model that :func:`sparsegrad.sparsify` was given, or
            ``differences_from`` is not the base.
    """
    if bases not in BASES:
        raise ValueError(f"bases={bases!r}; allowed: {', '.join(BASES)}.")
    if entries is not None and (differences_from is None or entries < 1):
        raise ValueError(f"entries={entries}; 1 or more, of the differences_from a base model: give both.")
    layers = _own_layers(model)
    first = next(iter(layers.values()))
    before = None if differences_from is None else _weights_of(differences_from, first)
    tensors, lost = _others(model, layers), dict[str, float]()
    for name, layer in layers.items():
        if before is None:
            held = changed(layer)
        else:
            held, lost[name] = largest_differences(layer, before[name], entries)
        tensors |= {f"{what}.{name}": tensor for what, tensor in held.items()}
    shared = {layer.kind: layer.basis for layer in layers.values() if layer.basis is not None}
    if bases == "inside":
        tensors |= {
            f"basis.{kind}.{letter}": getattr(basis, letter) for kind, basis in shared.items() for letter in "UV"
        }
    metadata = {
        "content": "adapter",
        "arguments": first.arguments,
        "shapes": {name: [layer.out_features, layer.in_features] for name, layer in layers.items()},
        "bases": {kind: _description(basis) for kind, basis in shared.items()},
        "base": {name: found for name, found in first.base.items() if not _is_held(name, tensors)},
    } | ({"lost": lost} if lost else {})
    return AdapterState({name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}, metadata)


@torch.no_grad()
def put_adapter(model: nn.Module, state: AdapterState, bases: Mapping[str, Basis] | None = None) -> nn.Module:
    """Sparsify a base model as the adapter was, and put the adapter's values in.

    Args:
        model: the base model that was fine-tuned, plain; changed in place.
        state: of :func:`adapter_state`.
        bases: by layer kind, where the adapter refers to them; their leading rows are taken, in its precision.

    Returns:
        The same model, with SparseGrad layers.

    Raises:
        ValueError: if the adapter belongs to another architecture or another base model, or its bases are missing or
            others, or it is damaged; the model is unchanged then.
    """
    arguments = dict(state.metadata["arguments"])
    targets = find_targets(model, arguments["target_modules"], arguments["layers_to_transform"])
    dense = {n.removeprefix("dense."): t for n, t in state.tensors.items() if n.startswith("dense.")}
    _refuse_other_models(model, state.metadata, targets, dense)
    held = {target.name: _held(target, state) for target in targets}
    found = {kind: _basis(kind, about, state, bases) for kind, about in state.metadata["bases"].items()} or None
    if found and arguments["form"] == "truncated":  # they are the leading rows alone
        arguments["ranks"] = {kind: list(basis.ranks) for kind, basis in found.items()}
    sparsify(model, found, **arguments)
    layers = sparsegrad_layers(model)
    for name, layer in layers.items():
        put(layer, held[name])
    named = _by_every_name(model)
    for name, tensor in model.state_dict().items():
        if (plain := _plain_name(name, named)) in dense:
            tensor.copy_(dense[plain])
    return model


def _own_layers(model: nn.Module) -> dict[str, SparseGradLinear]:
    """Of a model that sparsify was given: no part of it, nothing around it."""
    layers = sparsegrad_layers(model)
    if others := [name for name, layer in layers.items() if layer.name != name or not layer.arguments]:
        known = layers[others[0]].name or "none of its own"
        raise ValueError(
            f"sparsify was not given this model: it knows {others[0]} as {known}. Give the model that it was given, "
            "without what is around it."
        )
    if not layers:
        raise ValueError("the model has no SparseGrad layers: an adapter is of a model that sparsify was given.")
    return layers


def _weights_of(base: nn.Module, layer: SparseGradLinear) -> dict[str, Tensor]:
    """The target matrices of a plain model, ``(out_features, in_features)``, if it is the one that was sparsified."""
    now = fingerprints(base)
    if others := [name for name, found in layer.base.items() if now.get(name) != found]:
        raise ValueError(
            f"differences_from is not the model that sparsify was given: {', '.join(others[:4])} differ or are missing."
        )
    found = find_targets(base, layer.arguments["target_modules"], layer.arguments["layers_to_transform"])
    return {target.name: target.matrix(target.weight.detach()) for target in found}


def _refuse_other_models(
    model: nn.Module, metadata: Mapping[str, Any], targets: Sequence[Target], dense: Mapping[str, Tensor]
) -> None:
    state = model.state_dict()
    unknown = [n for n, t in dense.items() if n not in state or state[n].shape != t.shape]
    shapes = {t.name: list(t.shape) for t in targets}
    unknown += [n for n in shapes | metadata["shapes"] if shapes.get(n) != metadata["shapes"].get(n)]
    if unknown:
        raise ValueError(f"an adapter of another architecture: {', '.join(unknown[:4])} do not fit this model.")
    now = fingerprints(model)
    if others := [name for name, found in metadata["base"].items() if now.get(name) != found]:
        raise ValueError(
            f"an adapter of another base model: {', '.join(others[:4])}{' ...' if others[4:] else ''} differ "
            "from the weights that it was trained on, or are in another precision: load it on those."
        )


def _held(target: Target, state: AdapterState) -> dict[str, Tensor]:
    """The adapter's tensors for a target, if it can take them."""
    name, (out, columns) = target.name, target.shape
    held = {what: state.tensors[f"{what}.{name}"] for what in HELD if f"{what}.{name}" in state.tensors}
    if about := state.metadata["bases"].get(target.kind):
        out, columns = about["rows"][0] or out, about["rows"][1]  # without a V, rows are the outputs
    if not fits(held, target.shape, (out, columns)):
        found = ", ".join(f"{what} {tuple(tensor.shape)}" for what, tensor in held.items()) or "nothing"
        raise ValueError(f"a damaged adapter, of {found} for {name} {target.shape}: save it again.")
    return held


def _description(basis: Basis) -> dict[str, Any]:
    """What a basis is to be made of, and known by."""
    dtype = str(basis.U.dtype).removeprefix("torch.")
    return {"sha256": basis.identity(), "rows": [len(basis.V), len(basis.U)], "dtype": dtype}


def _basis(kind: str, about: Mapping[str, Any], state: AdapterState, given: Mapping[str, Basis] | None) -> Basis:
    """The adapter's own of a layer kind, or the given one as :func:`_description` has it."""
    if given is None:
        if any(f"basis.{kind}.{letter}" not in state.tensors for letter in "UV"):
            raise ValueError("the adapter refers to bases that it does not hold: give bases, those it was trained in.")
        return Basis(state.tensors[f"basis.{kind}.U"], state.tensors[f"basis.{kind}.V"])
    full, (r, c), dtype = kind_value(given, kind, "basis"), about["rows"], getattr(torch, about["dtype"])
    basis = Basis(full.U[:c].to(dtype), full.V[:r].to(dtype))
    if (found := basis.identity()) != about["sha256"]:
        raise ValueError(
            f"the basis of kind {kind!r} is not the one that the adapter was trained in (SHA-256 {found[:12]}, not "
            f"{about['sha256'][:12]}): give that one."
        )
    return basis


def _others(model: nn.Module, layers: Mapping[str, SparseGradLinear]) -> dict[str, Tensor]:
    """Parameters and buffers outside the layers' weights whose bits are not the base's, as ``dense.<plain name>``."""
    base = next(iter(layers.values())).base
    named = _by_every_name(model)
    state = {_plain_name(name, named): t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    return {f"dense.{n}": t for n, t in state.items() if n is not None and base.get(n) != fingerprint(t)}


def _by_every_name(model: nn.Module) -> dict[str, SparseGradLinear]:
    """SparseGrad layers by all of their names, as a state dictionary has them: blocks may be the same one."""
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, SparseGradLinear)}


def _is_held(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an adapter's tensors replace a parameter of the plain model whole, so that the base's may be any."""
    return f"dense.{name}" in tensors or f"weight.{name.removesuffix('.weight')}" in tensors


def _plain_name(name: str, layers: Mapping[str, SparseGradLinear]) -> str | None:
    """How the plain model calls what a sparsified one has under a name; None for what layers hold of their own."""
    owner = next((n for n in _prefixes(name) if n in layers), None)
    if owner is None:
        return None if f"{name}.0" in layers else name  # the place of experts' layers
    rest = name.removeprefix(f"{owner}.")
    if isinstance(layers[owner], QuantizedTruncatedLinear):  # the plain linear is kept inside
        return f"{owner}.{rest.removeprefix('linear.')}" if rest.startswith("linear.") else None
    return name if rest == "bias" else None


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
