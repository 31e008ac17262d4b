"""Bases and adapters on disk: safetensors with JSON metadata; nothing is pickled, files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.convert import find_targets, sparsegrad_layers, sparsify
from sparsegrad.core import CoreLinear
from sparsegrad.linear import SparseGradLinear
from sparsegrad.optim import SparseGradAdamW
from sparsegrad.quantized import QuantizedTruncatedLinear
from sparsegrad.truncated import TruncatedLinear

ORTHOGONALITY_TOLERANCE = 1e-3  # a float32 basis of 11,008 rows stays below 1e-4


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors, JSON metadata and a checksum of both to one safetensors file, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored, text = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, json.dumps(dict(metadata))
    blob = save(stored, {"sparsegrad": text, "sha256": _sha256(stored, text)})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote.

    Raises:
        ValueError: if the file is missing, damaged (a changed byte too), or not of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run the stage that writes it, or check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error}): {_AGAIN}") from None
    if "sparsegrad" not in metadata:
        raise ValueError(f"{path} is a safetensors file of another program: it has no 'sparsegrad' metadata.")
    if metadata.get("sha256") != _sha256(tensors, metadata["sparsegrad"]):
        fault = "its content does not fit its checksum" if "sha256" in metadata else "it has no checksum"
        raise ValueError(f"{path} is damaged, or of an older version ({fault}): {_AGAIN}")
    return tensors, json.loads(metadata["sparsegrad"])


_AGAIN = "run the stage that writes it again, or give another file."


def _sha256(tensors: Mapping[str, Tensor], metadata: str) -> str:
    """Of the metadata, and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(metadata.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_bases(path: str | Path, bases: Mapping[str, Basis], metadata: Mapping[str, Any] | None = None) -> None:
    """Write the bases of all layer kinds to one file.

    Args:
        path: a ``.safetensors`` file.
        bases: by layer kind; a kind may not contain a dot.
        metadata: JSON values, such as the hashes of the model and data that the gradients came from.
    """
    if any("." in kind for kind in bases):
        raise ValueError(f"layer kinds {list(bases)}: a kind may not contain a dot.")
    tensors = {f"{kind}.{letter}": getattr(basis, letter) for kind, basis in bases.items() for letter in "UV"}
    save_tensors(path, tensors, {"content": "bases"} | dict(metadata or {}))


def load_bases(path: str | Path) -> tuple[dict[str, Basis], dict[str, Any]]:
    """Read bases and their metadata.

    Raises:
        ValueError: if the file is missing or damaged, or a factor is not orthonormal.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("content") != "bases":
        raise ValueError(f"{path} holds {metadata.get('content')!r}, not bases.")
    bases = {kind: Basis(tensors[f"{kind}.U"], tensors[f"{kind}.V"]) for kind in dict.fromkeys(n[:-2] for n in tensors)}
    for kind, basis in bases.items():
        error = basis.orthogonality_error()
        if error > ORTHOGONALITY_TOLERANCE:
            raise ValueError(
                f"{path}: the {kind} basis is off orthogonality by {error:.1e}: run the basis stage again."
            )
    return bases, metadata


def save_adapter(
    path: str | Path, model: nn.Module, optimizer: SparseGradAdamW, sparsify_config: Mapping[str, Any]
) -> None:
    """Write what fine-tuning changed: the touched entries in rotated coordinates, and all other trained parameters.

    Of a truncated layer that is the whole core, and its weight too once the basis was refreshed: what earlier bases
    have moved does not lie in the last one's block.

    Args:
        path: a ``.safetensors`` file.
        model: a sparsified model.
        optimizer: the one that trained it; it knows which entries were touched.
        sparsify_config: the keyword arguments given to :func:`sparsegrad.sparsify` (JSON values: without the
            bases, and without the rule of selection, which no loaded adapter needs).
    """
    layers = sparsegrad_layers(model)
    kinds: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    bases: dict[str, str] = {}
    for name, layer in layers.items():
        rotated = layer.rotated_weight().flatten()
        if isinstance(layer, CoreLinear):
            tensors[f"values.{name}"] = rotated
            if isinstance(layer, TruncatedLinear) and layer.refreshes:
                tensors[f"weight.{name}"] = layer.weight
        else:
            indices = optimizer.touched(layer)
            tensors[f"indices.{name}"], tensors[f"values.{name}"] = indices, rotated[indices]
        if layer.basis is not None:
            label = kinds.setdefault(id(layer.basis), f"basis{len(kinds)}")
            tensors[f"{label}.U"], tensors[f"{label}.V"] = layer.basis.U, layer.basis.V
            bases[name] = label
    sparse = {id(layer.trained) for layer in layers.values()}
    dense = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in sparse}
    plain = _plain_names(layers)
    tensors |= {f"dense.{plain.get(name, name)}": parameter for name, parameter in dense.items()}
    shapes = {name: [layer.out_features, layer.in_features] for name, layer in layers.items()}
    metadata = {"content": "adapter", "bases": bases, "shapes": shapes, "sparsify": dict(sparsify_config)}
    save_tensors(path, tensors, metadata)


@torch.no_grad()
def load_adapter(path: str | Path, model: nn.Module) -> nn.Module:
    """Sparsify a base model as the adapter was, and put the adapter's values in.

    Args:
        path: written by :func:`save_adapter`.
        model: the base model that was fine-tuned, plain; changed in place.

    Returns:
        The same model, with SparseGrad layers; :func:`sparsegrad.merge` makes it plain.

    Raises:
        ValueError: if the file is damaged or belongs to another architecture.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("content") != "adapter":
        raise ValueError(f"{path} holds {metadata.get('content')!r}, not an adapter.")
    config = metadata["sparsify"]
    parameters = dict(model.named_parameters())
    dense = {n.removeprefix("dense."): t for n, t in tensors.items() if n.startswith("dense.")}
    unknown = [n for n, t in dense.items() if n not in parameters or parameters[n].shape != t.shape]
    targets = find_targets(model, config["target_modules"], config.get("layers_to_transform"))
    shapes = {t.name: [t.module.out_features, t.module.in_features] for t in targets}
    unknown += [n for n in shapes | metadata["shapes"] if shapes.get(n) != metadata["shapes"].get(n)]
    if unknown:
        raise ValueError(
            f"{path} is an adapter of another architecture: {', '.join(unknown[:4])} do not fit this model."
        )
    kinds = {t.kind: metadata["bases"][t.name] for t in targets if t.name in metadata["bases"]}
    bases = {kind: Basis(tensors[f"{label}.U"], tensors[f"{label}.V"]) for kind, label in kinds.items()} or None
    if bases and config.get("form") == "truncated":  # the file holds the leading rows alone
        config = config | {"ranks": {kind: list(basis.ranks) for kind, basis in bases.items()}}
    sparsify(model, bases, **config)
    for name, layer in sparsegrad_layers(model).items():
        values = tensors[f"values.{name}"]
        if isinstance(layer, TruncatedLinear) and f"weight.{name}" in tensors:
            layer.rebase(layer.basis)
            layer.weight.copy_(tensors[f"weight.{name}"])
        current = layer.rotated_weight().flatten()
        indices = tensors.get(f"indices.{name}", torch.arange(len(values))).to(current.device)
        layer.add_(indices, values.to(current) - current[indices])
    plain = _plain_names(sparsegrad_layers(model))
    for name, parameter in model.named_parameters():
        name = plain.get(name, name)
        if name in dense:
            parameter.copy_(dense[name])
    return model


def _plain_names(layers: Mapping[str, SparseGradLinear]) -> dict[str, str]:
    """Biases that stand elsewhere than in the plain model: a quantised linear is kept inside its layer."""
    return {f"{n}.linear.bias": f"{n}.bias" for n, m in layers.items() if isinstance(m, QuantizedTruncatedLinear)}
