"""The paper's form: the parameter is W_rot = V W U^T, and every pass multiplies by U^T, W_rot and V (Table 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsegrad.basis import Basis
from sparsegrad.linear import autocast
from sparsegrad.select import Rule, top_k
from sparsegrad.selecting import SelectingLinear

MATMULS = ("regular", "sparse_by_dense")


class RotatedLinear(SelectingLinear):
    """The paper's layer: y = x U^T W_rot^T V + b, with a sparse gradient of W_rot.

    Args:
        weight, bias, basis, k, select, select_in: as in :class:`~sparsegrad.selecting.SelectingLinear`; a full basis.
        matmul: ``regular``, or ``sparse_by_dense`` (paper, equations 1-2: rows of the output gradient that are zero, as
            padding leaves them, are skipped; the result is the same).
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
        matmul: str = "regular",
    ) -> None:
        if matmul not in MATMULS:
            raise ValueError(f"matmul={matmul!r}; allowed: {', '.join(MATMULS)}.")
        if basis is not None and not basis.is_full:
            raise ValueError(
                "form 'rotated' keeps W_rot = V W U^T whole, so it needs a full basis; this one is truncated."
            )
        super().__init__(weight, bias, basis, k, select=select, select_in=select_in)
        self.matmul = matmul

    @property
    def pass_waits_for(self) -> str:
        skips = "the rows that sparse by dense leaves out are counted" if self.matmul == "sparse_by_dense" else ""
        return super().pass_waits_for or skips

    @property
    def plain_state(self) -> bool:
        return self.basis is None

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)``."""
        x = autocast(x)
        if self.basis is not None:
            x = x @ self.basis.U.to(x.dtype).T
        y = _RotatedProduct.apply(x, self.weight, self)
        if self.basis is not None:
            y = y @ self.basis.V.to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def rotated_weight(self) -> Tensor:
        self.follow()
        return (self.weight if self.master is None else self.master).detach()

    def _from_original(self, weight: Tensor) -> Tensor:
        return weight if self.basis is None else self.basis.rotate(weight)

    def _to_original(self, weight: Tensor) -> Tensor:
        return weight if self.basis is None else self.basis.rotate_back(weight)


class _RotatedProduct(torch.autograd.Function):
    """x_rot W_rot^T with the paper's backward: a sparse or dense gradient of W_rot, optionally sparse by dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: RotatedLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return x @ weight.to(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - autograd calls it with one gradient
        ctx: Any, g: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        layer: RotatedLinear = ctx.layer
        g2, x2 = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        weight = weight.to(g.dtype)
        if layer.matmul == "sparse_by_dense":
            rows = g2.any(dim=1).nonzero().flatten()
            small = g2[rows]
            G = small.T @ x2[rows]
            grad_x = torch.zeros_like(x2).index_copy_(0, rows, small @ weight).view_as(x)
        else:
            G = g2.T @ x2
            grad_x = g @ weight
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        G = G.to(layer.weight.dtype)
        return grad_x, layer.compact(G) if layer.select_in == "backward" else G, None
