"""The truncated form: W_rot is trained in its leading r x c block alone, the core S, and nothing else is ever formed.

    V_r = V[:r]  (r, out_features)      U_c = U[:c]  (c, in_features)      W_now = W + V_r^T S U_c
    z = x U_c^T  (N, c)                 dS = (g V_r^T)^T z  (r, c)         dx = g W_now

dS is the leading block of G_rot = V G U^T, exactly. The backward pass needs z and not x, no gradient or state of W's
size exists, and S is an ordinary parameter with an ordinary dense gradient. What the block leaves out is lost. A basis
of the input side alone (:meth:`sparsegrad.Basis.input_side`) has no V: S is ``(out_features, c)``, dS = g^T z.

Two ways to apply a step (``update``):

- ``in_place``: the optimizer steps S from zero, adds V_r^T S U_c to W and sets S to zero; forward is a plain linear.
- ``side``: W stays as it is, and S as a float32 side path, y += (z S^T) V_r, until it is merged. In bfloat16 a step
  below about 1e-3 of the weight would vanish in place; S loses none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsegrad.basis import Basis
from sparsegrad.core import CoreLinear
from sparsegrad.linear import autocast, copied, version
from sparsegrad.select import Rule, top_k

UPDATES = ("in_place", "side")


class TruncatedLinear(CoreLinear):
    """A linear trained in the leading block of its rotated weight.

    Args:
        weight: ``(out_features, in_features)``; shared, not copied, where ``update`` is ``side``.
        bias: ``(out_features,)`` or None.
        basis, k, ranks, keep, select: as in :class:`~sparsegrad.core.CoreLinear`.
        update: ``in_place`` or ``side``; None takes ``in_place`` for float32 and wider, ``side`` below.

    Attributes:
        refreshes: how often the basis was changed (:func:`sparsegrad.refresh`), int64 scalar.

    Raises:
        ValueError: as :class:`~sparsegrad.core.CoreLinear`, and if the update is unknown or would lose its steps.
    """

    weight: nn.Parameter
    refreshes: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        basis: Basis | None,
        k: int,
        *,
        ranks: Sequence[int] | None = None,
        keep: int | None = None,
        select: Rule = top_k,
        update: str | None = None,
    ) -> None:
        low = torch.finfo(weight.dtype).bits < 32
        update = update or ("side" if low else "in_place")
        if update not in UPDATES:
            raise ValueError(f"update={update!r}; allowed: {', '.join(UPDATES)}.")
        if low and update == "in_place":
            raise ValueError(f"update='in_place' would lose small steps in {weight.dtype}: use update='side'.")
        shape, device = (weight.shape[0], weight.shape[1]), weight.device
        super().__init__(shape, basis, k, ranks=ranks, keep=keep, select=select, update=update, device=device)
        own = weight.detach()
        self.bias = None if bias is None else copied(bias)
        self.weight = nn.Parameter(own.clone() if update == "in_place" else own, requires_grad=False)
        self.core = self._zero_core(torch.promote_types(weight.dtype, torch.float32))
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64, device=device))
        self.register_load_state_dict_post_hook(_absorb_loaded)
        self._seen = version(self.weight)

    @property
    def moves_weight(self) -> bool:
        return (self.update == "in_place" and self.core.requires_grad) or bool(self.refreshes)

    @property
    def plain_state(self) -> bool:
        return self.update == "in_place"

    @property
    def plain_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)``."""
        core = self.core if self.update == "side" or self.core.requires_grad else None
        return TruncatedProduct.apply(
            autocast(x), self.weight, self.bias, core, self.basis.U, self.basis.V, self.update == "side"
        )

    def store_weight(self, dtype: torch.dtype) -> None:
        """Store W in another precision, below float32 with ``update="side"`` from now on; call it before training."""
        self.weight.data = self.weight.data.to(dtype)
        self._seen, self.moved = version(self.weight), None
        if torch.finfo(dtype).bits < 32:
            self.update = "side"

    @torch.no_grad()
    def absorb(self) -> None:
        """After a step of S: add it to W and start from zero again, where steps are taken in place."""
        if self.update == "in_place":
            self.follow()
            add_product_(self.weight, self.basis.V, self.core, self.basis.U)
            self.core.zero_()
            self._seen = version(self.weight)

    @torch.no_grad()
    def original_weight(self) -> Tensor:
        weight = self.weight.detach()
        if self.update == "in_place":
            return weight
        return add_product_(weight.to(self.core.dtype, copy=True), self.basis.V, self.core, self.basis.U)

    @torch.no_grad()
    def rebase(self, basis: Basis) -> None:
        """Move S into W, so that the basis may be changed; the caller changes it.

        Where W is below float32, what its rounding loses is kept in S, as far as it lies in the new block.

        Args:
            basis: the new one, with r and c rows.
        """
        self.refreshes += 1
        self.moved = None  # what earlier bases have moved does not lie in this one's block
        if self.update == "in_place":
            return
        exact = self.original_weight()
        self.weight = nn.Parameter(exact.to(self.weight.dtype), requires_grad=False)  # the old one may be shared
        lost = torch.finfo(self.weight.dtype).bits < 32
        self.core.copy_(basis.rotate(exact - self.weight) if lost else torch.zeros_like(self.core))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        dtype = self.weight.dtype
        super()._apply(fn, recurse)
        if torch.finfo(self.weight.dtype).bits < 32:
            self.update = "side"  # the model was cast down
        if self.weight.dtype != dtype:
            self.moved = None  # rounded
        return self


class TruncatedProduct(torch.autograd.Function):
    """The linear and its side path; saves z ``(N, c)`` and references to what the layer holds anyway.

    Without a weight it is the side path alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        core: Tensor | None,
        U: Tensor,
        V: Tensor,
        side: bool,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        rotates = V.shape[0] > 0  # else V_r stands for the identity
        z = None if core is None else F.linear(rows, U.to(x.dtype))
        y = None
        if weight is not None:
            y = F.linear(rows, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if side:
            assert core is not None and z is not None  # a side path is the core's
            t, S = (z @ core.to(x.dtype).T, V.to(x.dtype)) if rotates else (z, core.to(x.dtype).T)
            y = t @ S if y is None else y.addmm_(t, S)
        assert y is not None  # there is a weight or a side path
        # The bases in their own precision: their casts would be saved activations too.
        ctx.save_for_backward(weight, bias, core, U, V, z if ctx.needs_input_grad[3] else None)
        ctx.side = side
        return y.view(*x.shape[:-1], V.shape[1])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - autograd calls it with one gradient
        ctx: Any, g: Tensor
    ) -> tuple[Tensor | None, ...]:
        weight, bias, core, U, V, z = ctx.saved_tensors
        needs_x, _, needs_bias, needs_core = ctx.needs_input_grad[:4]
        grad_x = grad_bias = grad_core = None
        rows = g.reshape(-1, g.shape[-1])
        h = rows @ V.to(g.dtype).T if V.shape[0] > 0 and (needs_core or ctx.side) else rows
        if needs_x:
            grad_x = None if weight is None else rows @ weight.to(g.dtype)
            if ctx.side:
                t, U_c = h @ core.to(g.dtype), U.to(g.dtype)
                grad_x = t @ U_c if grad_x is None else grad_x.addmm_(t, U_c)
            assert grad_x is not None
            grad_x = grad_x.view(*g.shape[:-1], U.shape[1])
        if needs_bias:
            grad_bias = rows.sum(dim=0).to(bias.dtype)
        if needs_core:
            grad_core = (h.T @ z).to(core.dtype)
        return grad_x, None, grad_bias, grad_core, None, None, None


def _absorb_loaded(layer: TruncatedLinear, _: object) -> None:
    """A state that was saved with a side path may be loaded into a layer that has none."""
    if layer.update == "in_place" and not layer.core.is_meta and layer.core.any():
        layer.absorb()


def add_product_(weight: Tensor, V: Tensor, S: Tensor, U: Tensor) -> Tensor:
    """``weight += V^T S U`` in the cheaper order of its two products; returns the weight."""
    V, S, U = V.to(weight.dtype), S.to(weight.dtype), U.to(weight.dtype)
    if not len(V):
        return weight.addmm_(S, U)
    (r, o), (c, i) = V.shape, U.shape
    if r * c * i + r * o * i <= r * c * o + c * o * i:
        return weight.addmm_(V.T, S @ U)
    return weight.addmm_(V.T @ S, U)
