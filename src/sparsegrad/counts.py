"""How many numbers steps move."""

from __future__ import annotations

from torch import nn

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
