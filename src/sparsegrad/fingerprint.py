"""What tensors hold, as hashes: SHA-256 of bytes, and a fast one of whole models.

:func:`fingerprint` tells whether a model is the one that an adapter was trained on. The bits of a tensor are summed as
integers by rows and by columns, where the tensor lies, and the sums are hashed. That is exact, the same everywhere, and
as fast as memory: LLaMa-2's 27 GB by SHA-256 alone would take minutes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> str:
    """16 hexadecimal digits for dtype, shape and values, to the bit."""
    if hasattr(tensor, "__tensor_flatten__"):  # several tensors that behave as one: torchao's quantised weights
        names, _ = cast(Any, tensor).__tensor_flatten__()
        return hashlib.sha256("".join(fingerprint(getattr(tensor, name)) for name in names).encode()).hexdigest()[:16]
    sums = _sums(torch.view_as_real(tensor) if tensor.is_complex() else tensor) if tensor.numel() else {}
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + save(sums)).hexdigest()[:16]


def _sums(tensor: Tensor) -> dict[str, Tensor]:
    """Of the bits, along rows and along columns."""
    rows = tensor.detach().reshape(len(tensor) if tensor.dim() > 1 else 1, -1).contiguous()
    size = rows.element_size()
    # Eight bytes at a time where rows allow it: narrower integers would be cast one by one.
    integers = _INTEGERS[size] if rows.shape[1] * size % 8 else torch.int64
    aligned = rows if rows.storage_offset() * size % 8 == 0 else rows.clone()
    return {str(dim): aligned.view(integers).sum(dim, dtype=torch.int64).cpu() for dim in (0, 1)}


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Of every parameter and buffer in a model's state, by name."""
    return {name: fingerprint(t) for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def sha256(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """64 hexadecimal digits for a text, and for every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        raw = tensor.detach().cpu().flatten().view(torch.uint8).numpy()
        digest.update(memoryview(raw))  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()
