"""Gradients of several layers into one basis, and their sparse updates back out of it, in the precision asked for.

``float32`` and ``tf32`` are what they say on a CUDA device; on a CPU both are float32. ``bf16`` rounds the factors of
a product to bfloat16 and sums in float32, as a linear does under autocast. ``auto`` on CUDA is what the layer's own
linear computed in: ``bf16`` where that was bfloat16, else plain products by torch's settings (float16 would lose small
gradients). On a CPU it is float32, or the basis' float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsegrad import foreach
from sparsegrad.basis import Basis

PRECISIONS = ("auto", "float32", "tf32", "bf16")
SPARSE_COST = 25  # an operation of a sparse product takes about as long as so many of a dense one (measured, CPU core)


class Rotation:
    """The products with one basis.

    Args:
        basis: with a V.
        precision: of :data:`PRECISIONS`.
        computed: dtype that the layers' forward pass computed in.
    """

    def __init__(self, basis: Basis, precision: str, computed: torch.dtype) -> None:
        on_cuda = basis.U.is_cuda
        low = precision == "bf16" or (precision == "auto" and on_cuda and computed == torch.bfloat16)
        self._low = torch.bfloat16 if low and basis.U.dtype == torch.float32 else None
        self._tf32 = {"float32": False, "tf32": True}.get(precision) if on_cuda else None
        self.U, self.V = (f if self._low is None else f.to(self._low) for f in (basis.U, basis.V))

    def rotate(self, gradients: list[Tensor]) -> Tensor:
        """``V G U^T`` of gradients ``(out_features, in_features)``, stacked, in the basis' precision.

        The list is emptied, so that no more than two of the three stacks are there at once.
        """
        G = self.U.new_empty(len(gradients), *gradients[0].shape)
        foreach.copy_(G.unbind(), gradients)  # stacked and cast in one pass
        gradients.clear()
        with _tf32(self._tf32):
            half = G @ self.U.T
            del G
            return self._last(self.V, half)

    def back(self, targets: Sequence[Tensor], places: Tensor, delta: Tensor) -> None:
        """``target += V^T D U`` for each target, where D is zero but for ``delta`` at ``places``.

        Args:
            targets: ``(out_features, in_features)``, one a layer, float32 or wider.
            places: flat in ``(rank_out, rank_in)``, int64 ``(layers, k)``, ascending in each row, no duplicates.
            delta: ``(layers, k)``.
        """
        with _tf32(self._tf32):
            if targets[0].is_cuda:
                updates = self._last(self.V.T, self._dense(places, delta) @ self.U)
                foreach.add_(targets, updates.to(targets[0].dtype).unbind())
            else:
                self._back_on_cpu(targets, places, delta)

    def _last(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right`` for each layer; sums of rounded factors stay in float32."""
        if self._low is None:
            return left @ right
        if not right.is_cuda:
            return left.float() @ right.float()
        return torch.bmm(left.expand(len(right), *left.shape), right, out_dtype=torch.float32)

    def _dense(self, places: Tensor, delta: Tensor) -> Tensor:
        D = delta.new_zeros(len(places), len(self.V) * len(self.U), dtype=self.U.dtype)
        return D.scatter_(1, places, delta.to(D.dtype)).view(len(places), len(self.V), len(self.U))

    def _back_on_cpu(self, targets: Sequence[Tensor], places: Tensor, delta: Tensor) -> None:
        """Its first product, with V or with U, is dense or sparse over the entries: the cheapest of four ways."""
        (r, o), (c, i), n = self.V.shape, self.U.shape, places.shape[1]
        U, V = self.U.to(targets[0].dtype), self.V.to(targets[0].dtype)
        V_first, U_first = c * o * i, r * o * i  # operations of the second product; then those of the first
        costs = {
            ("V", "dense"): V_first + r * c * o,
            ("U", "dense"): U_first + r * c * i,
            ("V", "sparse"): V_first + SPARSE_COST * n * o,
            ("U", "sparse"): U_first + SPARSE_COST * n * i,
        }
        first, way = min(costs, key=costs.__getitem__)
        delta = delta.to(U.dtype)
        if way == "dense":
            D = self._dense(places, delta).to(U.dtype)
            halves = V.T @ D if first == "V" else D @ U
        elif first == "V":
            halves = _sparse(places % c, places // c, delta, (c, r), V).mT
        else:
            halves = _sparse(places // c, places % c, delta, (r, c), U)
        for target, half in zip(targets, halves, strict=True):
            _ = target.addmm_(half, U) if first == "V" else target.addmm_(V.T, half)


def _sparse(row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int], factor: Tensor) -> Tensor:
    """The sparse matrices of all layers, ``(layers, *shape)``, times one factor: ``(layers, shape[0], factor's)``."""
    layers = len(row)
    row = (row + torch.arange(layers, device=row.device)[:, None] * shape[0]).flatten()
    order = torch.argsort(row * shape[1] + column.flatten())
    counts = torch.bincount(row, minlength=layers * shape[0]).cumsum(0)
    starts = torch.cat((counts.new_zeros(1), counts))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        stacked = torch.sparse_csr_tensor(
            starts, column.flatten()[order], values.flatten()[order], (layers * shape[0], shape[1]),
            check_invariants=False,
        )  # fmt: skip
    return (stacked @ factor).view(layers, shape[0], -1)


@contextmanager
def _tf32(allowed: bool | None) -> Generator[None]:
    """torch's setting for products of float32 on CUDA, for a while; None leaves it."""
    before = torch.backends.cuda.matmul.allow_tf32
    if allowed is not None:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        if allowed is not None:
            torch.backends.cuda.matmul.allow_tf32 = before
