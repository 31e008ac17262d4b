"""The family that trains a core S ``(r, c)`` in the leading rows of a basis, beside a weight that has no gradient.

:mod:`sparsegrad.truncated` states the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.linear import SparseGradLinear, SparseGradWeight
from sparsegrad.select import Rule, check_k, top_k


def core_shape(k: int, limits: tuple[int, int]) -> tuple[int, int]:
    """r and c of a core of at most k entries: r = c = floor(sqrt(k)).

    Where one side meets its limit, the other takes the rest of the budget.

    Args:
        k: budget of entries.
        limits: the largest r and c: the shape of the weight, or the rows of V and U of a truncated basis.

    Raises:
        ValueError: if k is out of range.
    """
    check_k(k, limits)
    r, c = (min(isqrt(k), limit) for limit in limits)
    if r == limits[0]:
        c = min(k // r, limits[1])
    if c == limits[1]:
        r = min(k // c, limits[0])
    return r, c


def checked_ranks(k: int, ranks: Sequence[int] | None, basis: Basis) -> tuple[int, int]:
    """r and c of a budget, or those given.

    Raises:
        ValueError: if they exceed the budget or the rows of the basis.
    """
    limits = basis.ranks
    check_k(k, (basis.out_features, basis.in_features))
    if not basis.rotates_output and k < limits[0]:
        raise ValueError(f"k={k}; a core of all outputs needs at least {limits[0]} entries, one a row.")
    if ranks is None:
        return core_shape(k, limits) if basis.rotates_output else (limits[0], min(k // limits[0], limits[1]))
    if len(ranks) != 2 or not all(isinstance(n, int) and 1 <= n <= m for n, m in zip(ranks, limits, strict=True)):
        raise ValueError(f"ranks={ranks!r}; this basis allows (r, c) from (1, 1) to {limits}.")
    r, c = ranks
    if not basis.rotates_output and r != limits[0]:
        raise ValueError(f"ranks={(r, c)}; a basis of the input side leaves all {limits[0]} outputs in the core.")
    if r * c > k:
        raise ValueError(f"ranks={(r, c)} are {r * c} entries, more than k={k}: lower one of them or raise k.")
    return r, c


class CoreLinear(SparseGradLinear):
    """The family that trains a core beside a weight which has no gradient.

    Args:
        shape: of the weight, ``(out_features, in_features)``.
        basis: for layers of this kind. Only the leading rows are kept: an object of r and c rows is shared as it is.
        k: budget of entries; :func:`core_shape` makes it a square core, unless ``ranks`` says otherwise.
        ranks: ``(r, c)``; r * c may not exceed k. With a basis of the input side alone r is out_features.
        keep: entries of the core's gradient kept at a step, selected after all sums; None keeps all.
        select: the rule that says which of them.
        update: ``in_place`` or ``side``, see the module.
        device: of the weight.

    Attributes:
        core: S, ``(r, c)``, in float32 at least.

    Raises:
        ValueError: if the basis is missing or of other shapes, or k, ranks or keep are out of range.
    """

    core: nn.Parameter

    def __init__(
        self,
        shape: tuple[int, int],
        basis: Basis | None,
        k: int,
        *,
        ranks: Sequence[int] | None,
        keep: int | None,
        select: Rule,
        update: str,
        device: torch.device,
    ) -> None:
        if basis is None:
            raise ValueError("form 'truncated' trains the leading block of a rotated weight, so it needs a basis.")
        r, c = checked_ranks(k, ranks, basis)
        if keep is None and select is not top_k:
            raise ValueError("keep=None trains the whole core: give keep, a number of entries, for a rule to select.")
        kept = r * c if keep is None else check_k(keep, (r, c))
        super().__init__(shape, basis.leading(r, c), kept, select, device)
        self.basis: Basis
        self.ranks, self.keep, self.update = (r, c), keep, update

    @classmethod
    def options_by(cls, basis: Basis, k: int, *, ranks: Sequence[int] | None = None, **options: Any) -> dict[str, Any]:
        return {"ranks": checked_ranks(k, ranks, basis)}

    @property
    def trained(self) -> nn.Parameter:
        return self.core

    @property
    def selects(self) -> bool:
        return self.keep is not None

    @torch.no_grad()
    def add_(self, indices: Tensor, delta: Tensor) -> None:
        """As in the other forms, of the block ``W_rot[:r, :c]``."""
        self.core.view(-1).index_add_(0, indices, delta.to(self.core.dtype))
        self.absorb()

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, ranks={self.ranks}, keep={self.keep}, update={self.update}"

    def _zero_core(self, dtype: torch.dtype) -> SparseGradWeight:
        return SparseGradWeight(torch.zeros(*self.ranks, dtype=dtype, device=self.basis.U.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        core = self.core.detach()
        super()._apply(fn, recurse)
        if torch.finfo(self.core.dtype).bits < 32:  # the model was cast down: the core holds what a step moves
            self.core.data = core.to(self.core.device)
        return self
