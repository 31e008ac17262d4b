"""The folded form: the parameter is W, forward is a plain linear, and only the gradient is rotated.

An update dW_rot in rotated coordinates is folded back as ``V^T dW_rot U``: exact, because the rotation is linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsegrad.basis import Basis
from sparsegrad.linear import SparseGradLinear, autocast
from sparsegrad.select import check_k


class FoldedLinear(SparseGradLinear):
    """A plain linear whose gradient is rotated and whose update is folded back; W stays in place."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, basis: Basis | None, k: int, *, select_in: str = "step"
    ) -> None:
        super().__init__(weight, bias, basis, k, select_in=select_in)
        self._gradient: tuple[Tensor, Tensor] | None = None
        if basis is not None:
            check_k(k, (basis.V.shape[0], basis.U.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)``."""
        if self.select_in == "step" or not (self.weight.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.weight, self.bias)
        return _FoldedProduct.apply(autocast(x), self.weight, self.bias, self)

    def zero_gradient(self) -> None:
        super().zero_gradient()
        self._gradient = None

    def _from_original(self, weight: Tensor) -> Tensor:
        return weight

    def _to_original(self, weight: Tensor) -> Tensor:
        return weight

    def _gradient_to_rotated(self, dense: Tensor) -> Tensor:
        return dense if self.basis is None else self.basis.rotate(dense)

    def _pending(self) -> tuple[Tensor, Tensor] | None:
        return self._gradient

    def _set_pending(self, indices: Tensor, values: Tensor) -> None:
        self._gradient = (indices, values)

    def _add(self, target: Tensor, indices: Tensor, delta: Tensor) -> None:
        if self.basis is None:
            target.view(-1).index_add_(0, indices, delta)
            return
        # Only the rows and columns of dW_rot that hold an entry take part in V^T dW_rot U.
        width = self.basis.U.shape[0]
        rows, row = torch.unique(indices // width, return_inverse=True)
        columns, column = torch.unique(indices % width, return_inverse=True)
        block = delta.new_zeros(len(rows), len(columns))
        block[row, column] = delta
        V, U = self.basis.V[rows].to(delta.dtype), self.basis.U[columns].to(delta.dtype)
        if len(rows) * self.in_features <= len(columns) * self.out_features:
            target.addmm_(V.T, block @ U)
        else:
            target.addmm_(V.T @ block, U)

    def _rotated_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """G_rot from the output gradient ``(N, out)`` and the input ``(N, in)``, the cheaper of two exact ways."""
        if self.basis is None:
            return (g.T @ x).to(self.weight.dtype)
        U, V = self.basis.U, self.basis.V
        o, i = self.out_features, self.in_features
        if len(x) * (i * i + o * o) < o * i * (i + o):  # rotate both factors: 2N(i^2 + o^2) against 2oi(i + o) flop
            return (g.to(V.dtype) @ V.T).T @ (x.to(U.dtype) @ U.T)
        return self.basis.rotate(g.T @ x)


class _FoldedProduct(torch.autograd.Function):
    """A linear whose weight gradient is rotated and selected at once and handed to the layer, never to ``.grad``."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, layer: FoldedLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        layer: FoldedLinear = ctx.layer
        layer._refuse_second_backward(layer._gradient is not None)
        g2 = g.reshape(-1, g.shape[-1])
        layer._set_pending(*layer._top_k(layer._rotated_gradient(g2, x.reshape(-1, x.shape[-1]))))
        grad_x = g @ weight.to(g.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = g2.sum(dim=0).to(layer.bias.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None
