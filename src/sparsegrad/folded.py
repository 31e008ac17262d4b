"""The folded form: the parameter is W, forward is a plain linear, and only the gradient is rotated.

An update dW_rot in rotated coordinates is folded back as ``V^T dW_rot U``: exact, because the rotation is linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsegrad.basis import Basis
from sparsegrad.linear import autocast
from sparsegrad.rotation import PRECISIONS, Rotation
from sparsegrad.select import Rule, top_k
from sparsegrad.selecting import SelectingLinear


class FoldedLinear(SelectingLinear):
    """A plain linear whose gradient is rotated and whose update is folded back; W stays in place.

    Args:
        weight, bias, basis, k, select, select_in: as in :class:`~sparsegrad.selecting.SelectingLinear`.
        rotation: precision of these products: ``auto``, ``float32``, ``tf32`` or ``bf16``
            (:mod:`sparsegrad.rotation`).
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        basis: Basis | None,
        k: int,
        *,
        select: Rule = top_k,
        select_in: str = "step",
        rotation: str = "auto",
    ) -> None:
        if rotation not in PRECISIONS:
            raise ValueError(f"rotation={rotation!r}; allowed: {', '.join(PRECISIONS)}.")
        super().__init__(weight, bias, basis, k, select=select, select_in=select_in)
        self.rotation = rotation
        self._computed = weight.dtype  # what the latest forward pass computed in

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)``."""
        if torch.is_grad_enabled():
            self._computed = autocast(x).dtype
        if self.select_in == "step" or not (self.weight.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.weight, self.bias)
        return _FoldedProduct.apply(autocast(x), self.weight, self.bias, self)

    @property
    def likeness(self) -> tuple[object, ...]:
        return *super().likeness, self.rotation, self._computed

    @staticmethod
    def rotated_gradients(layers: Sequence[FoldedLinear], gradients: list[Tensor]) -> Tensor:
        if layers[0].basis is None:
            return SelectingLinear.rotated_gradients(layers, gradients)
        return layers[0]._products().rotate(gradients)

    def _add(self, targets: Sequence[Tensor], places: Tensor, delta: Tensor) -> None:
        if self.basis is None:
            super()._add(targets, places, delta)
        else:
            self._products().back(targets, places, delta)

    def _products(self) -> Rotation:
        assert self.basis is not None
        return Rotation(self.basis, self.rotation, self._computed)


def rotated_product(basis: Basis, g: Tensor, x: Tensor) -> Tensor:
    """``V (g^T x) U^T``; each side is rotated where it is cheaper, before the product or after it.

    The factor x costs 2 N in^2 operations to rotate, the product 2 out in^2; likewise g and 2 in out^2.

    Args:
        g: ``(N, out_features)``.
        x: ``(N, in_features)``.
    """
    U, V = basis.U, basis.V
    rows = len(x)
    early_x, early_g = rows < basis.out_features, rows < basis.in_features
    if early_x or early_g:
        g, x = g.to(V.dtype), x.to(U.dtype)
    if early_x:
        x = x @ U.T
    if early_g:
        g = g @ V.T
    G = (g.T @ x).to(V.dtype)
    G = G if early_g else V @ G
    return G if early_x else G @ U.T


class _FoldedProduct(torch.autograd.Function):
    """A linear whose weight gradient is rotated and selected at once: no dense one is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: FoldedLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - autograd calls it with one gradient
        ctx: Any, g: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        layer: FoldedLinear = ctx.layer
        g2, x2 = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        basis, kept = layer.basis, None
        if ctx.needs_input_grad[1]:
            kept = layer.compact((g2.T @ x2).to(weight.dtype) if basis is None else rotated_product(basis, g2, x2))
        grad_x = g @ weight.to(g.dtype) if ctx.needs_input_grad[0] else None
        bias = layer.bias if ctx.needs_input_grad[2] else None
        grad_bias = None if bias is None else g2.sum(dim=0).to(bias.dtype)
        return grad_x, kept, grad_bias, None
