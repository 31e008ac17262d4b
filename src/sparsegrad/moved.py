"""Which entries steps have moved, as one tensor in a model's state.

A weight that was loaded may differ from the base anywhere, so an adapter would hold all of it. With this it holds what
it held where the state was saved.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from safetensors.torch import load, save
from torch import Tensor

from sparsegrad.gaps import from_gaps, to_gaps
from sparsegrad.linear import SparseGradLinear


def pack(layers: Iterable[SparseGradLinear]) -> Tensor:
    """Of every layer that knows what it has moved, under its name and its base weight's fingerprint; uint8 ``(n,)``."""
    known = {_key(layer): layer.moved for layer in layers}
    blob = save({key: to_gaps(moved) for key, moved in known.items() if moved is not None})
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8)


def unpack(packed: Tensor, layers: Iterable[SparseGradLinear]) -> None:
    """Tell layers of the same base what has moved, after their weights were loaded."""
    known = load(bytes(packed.cpu().numpy()))
    for layer in layers:
        if (gaps := known.get(_key(layer))) is not None:
            layer.follow()
            layer.moved = from_gaps(gaps).to(layer.trained.device)


def _key(layer: SparseGradLinear) -> str:
    return f"{layer.start} {layer.name}"
