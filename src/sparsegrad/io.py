"""Tensors and bases on disk: safetensors with JSON metadata and a checksum.

Nothing is pickled, files appear whole or not at all, and a changed byte is found when a file is read.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparsegrad.basis import Basis
from sparsegrad.fingerprint import sha256


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors, JSON metadata and a checksum of both to one safetensors file, atomically.

    Tensors that share memory are written one by one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    text = json.dumps(dict(metadata))
    blob = save(stored, {"sparsegrad": text, "sha256": sha256(stored, text)})
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
    if metadata.get("sha256") != sha256(tensors, metadata["sparsegrad"]):
        fault = "its content does not fit its checksum" if "sha256" in metadata else "it has no checksum"
        raise ValueError(f"{path} is damaged, or of an older version ({fault}): {_AGAIN}")
    return tensors, json.loads(metadata["sparsegrad"])


_AGAIN = "run the stage that writes it again, or give another file."


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
    bases = {}
    for kind in dict.fromkeys(name[:-2] for name in tensors):
        try:
            bases[kind] = Basis(tensors[f"{kind}.U"], tensors[f"{kind}.V"])
            bases[kind].refuse_skewed()
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: no basis of kind {kind!r} ({error}): run the basis stage again.") from None
    return bases, metadata
