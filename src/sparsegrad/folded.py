"""The folded form: the parameter is W, forward is a plain linear, and only the gradient is rotated.

An update dW_rot in rotated coordinates is folded back as ``V^T dW_rot U``: exact, because the rotation is linear.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsegrad.basis import Basis
from sparsegrad.linear import autocast
from sparsegrad.selecting import SelectingLinear

# An operation of a sparse product takes about as long as so many of a dense one (measured, one CPU core).
SPARSE_COST = 25


class FoldedLinear(SelectingLinear):
    """A plain linear whose gradient is rotated and whose update is folded back; W stays in place."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)``."""
        if self.select_in == "step" or not (self.weight.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.weight, self.bias)
        return _FoldedProduct.apply(autocast(x), self.weight, self.bias, self)

    def _gradient_to_rotated(self, dense: Tensor) -> Tensor:
        return dense if self.basis is None else self.basis.rotate(dense)

    def _add(self, target: Tensor, indices: Tensor, delta: Tensor) -> None:
        if self.basis is None:
            super()._add(target, indices, delta)
        else:
            add_rotated_back_(target, self.basis, indices, delta)


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


def add_rotated_back_(target: Tensor, basis: Basis, indices: Tensor, delta: Tensor) -> None:
    """``target += V^T dW_rot U``, where dW_rot holds ``delta`` at ``indices`` and is zero elsewhere.

    Only the rows and columns of dW_rot that hold an entry take part: nr rows and nc columns. Its first product, with V
    or with U, is dense over nr x nc, or sparse over the entries, and the cheaper of these four ways is taken.

    Args:
        target: ``(out_features, in_features)``.
        indices: flat, of ``(rank_out, rank_in)``, int64 ``(n,)``, ascending, no duplicates.
        delta: ``(n,)``, in the target's dtype.
    """
    width, (o, i), n = basis.U.shape[0], target.shape, len(indices)
    rows, row = torch.unique(indices // width, return_inverse=True)
    columns, column = torch.unique(indices % width, return_inverse=True)
    nr, nc = len(rows), len(columns)
    V_first, U_first = nc * o * i, nr * o * i  # operations of the second product; then those of the first
    costs = {
        ("V", "dense"): V_first + nr * nc * o,
        ("U", "dense"): U_first + nr * nc * i,
        ("V", "sparse"): V_first + SPARSE_COST * n * o,
        ("U", "sparse"): U_first + SPARSE_COST * n * i,
    }
    first, way = min(costs, key=costs.__getitem__)
    V, U = basis.V.to(delta.dtype), basis.U.to(delta.dtype)
    if way == "sparse":
        if first == "V":
            target.addmm_((_csr(column, indices // width, delta, (nc, len(V))) @ V).T, U[columns])
        else:
            target.addmm_(V[rows].T, _csr(row, indices % width, delta, (nr, len(U))) @ U)
        return
    block = delta.new_zeros(nr, nc)
    block[row, column] = delta
    if first == "V":
        target.addmm_(V[rows].T @ block, U[columns])
    else:
        target.addmm_(V[rows].T, block @ U[columns])


def _csr(row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    order = torch.argsort(row * shape[1] + column)
    counts = torch.bincount(row, minlength=shape[0]).cumsum(0)
    starts = torch.cat((counts.new_zeros(1), counts))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, column[order], values[order], shape, check_invariants=False)


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
