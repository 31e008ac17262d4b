"""What steps move: how many numbers, and which entries, as one tensor in a model's state.

A weight that was loaded may differ from the base anywhere, so an adapter would hold all of it. With this it holds what
it held where the state was saved.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from sparsegrad.gaps import from_gaps, to_gaps
from sparsegrad.linear import SparseGradLinear
from sparsegrad.quantized import is_quantized


def numbers(model: nn.Module) -> tuple[int, int, int]:
    """Numbers that a step moves, the trained parameters that they lie in, and all parameters."""
    modules = list(model.modules())
    kept = {id(m.trained): m.k for m in modules if isinstance(m, SparseGradLinear)}
    packed = {  # 4 bit: two numbers a byte
        id(m.weight): m.in_features * m.out_features for m in modules if isinstance(m, nn.Linear) and is_quantized(m)
    }
    sizes = {p: packed.get(id(p), p.numel()) for p in model.parameters()}
    trained = {p: size for p, size in sizes.items() if p.requires_grad}
    return sum(kept.get(id(p), n) for p, n in trained.items()), sum(trained.values()), sum(sizes.values())


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
