"""The family that keeps a weight of full size and replaces its gradient by k entries of it.

Selection happens once a step, after all micro-batches and ranks are summed, so the result does not depend on how a
batch is cut (``select_in="step"``). Where a batch is one backward pass, ``select_in="backward"`` selects layer by layer
and never keeps the dense gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.linear import SparseGradLinear, SparseGradWeight, copied, version
from sparsegrad.select import Rule, check_k, top_k

SELECT_IN = ("step", "backward")


class SelectingLinear(SparseGradLinear):
    """What both forms share; which coordinates the weight is trained in is theirs to say.

    Args:
        weight: ``(out_features, in_features)``, in original coordinates.
        bias: ``(out_features,)`` or None; always in original coordinates (D7).
        basis: for layers of this kind; None stands for the identity (no rotation).
        k: entries of the gradient kept at every step.
        select: the rule that says which (:data:`sparsegrad.select.Rule`).
        select_in: ``step`` (safe everywhere) or ``backward`` (one backward pass a step, no dense gradient kept).

    Attributes:
        master: of a weight below float32, its float32 copy; else None.

    Raises:
        ValueError: if the basis has other shapes than the weight, k is out of range, or an option is unknown.
    """

    weight: nn.Parameter
    master: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        basis: Basis | None,
        k: int,
        *,
        select: Rule = top_k,
        select_in: str = "step",
    ) -> None:
        shape = (weight.shape[0], weight.shape[1])
        super().__init__(shape, basis, k, select, weight.device)
        if basis is not None and not basis.rotates_output:
            raise ValueError("this form rotates both sides; a basis of the input side is for form 'truncated'.")
        check_k(k, shape if basis is None else basis.ranks)
        if select_in not in SELECT_IN:
            raise ValueError(f"select_in={select_in!r}; allowed: {', '.join(SELECT_IN)}.")
        self.select_in = select_in
        self.bias = None if bias is None else copied(bias)
        self.register_buffer("master", None)
        self.weight = SparseGradWeight(self._from_original(weight.detach()).to(weight.dtype).clone())
        self._keep_master(weight.detach())
        self._seen = version(self.weight)

    @property
    def trained(self) -> nn.Parameter:
        return self.weight

    @property
    def pass_waits_for(self) -> str:
        return "gradients are selected in the backward pass" if self.select_in == "backward" else ""

    @property
    def moves_weight(self) -> bool:
        return self.weight.requires_grad

    @property
    def plain_dtype(self) -> torch.dtype:
        return self.weight.dtype

    @torch.no_grad()
    def add_(self, indices: Tensor, delta: Tensor) -> None:
        self.follow()
        self.note_moved(indices)
        self.add_together([self], indices[None], delta[None])

    @staticmethod
    @torch.no_grad()
    def add_together(layers: Sequence[SelectingLinear], places: Tensor, delta: Tensor) -> None:
        for layer in layers:
            layer.follow()
            layer._keep_master(None)
        targets = [layer.weight if layer.master is None else layer.master for layer in layers]
        layers[0]._add(targets, places, delta.to(targets[0].dtype))
        for layer in layers:
            if layer.master is not None:
                layer.weight.copy_(layer.master)
            layer._seen = version(layer.weight)

    def original_weight(self) -> Tensor:
        self.follow()
        weight = self.weight if self.master is None else self.master
        return self._to_original(weight.detach())

    @torch.no_grad()
    def set_original(self, weight: Tensor) -> None:
        """Put a weight ``(out_features, in_features)`` in original coordinates in."""
        exact = self._from_original(weight.to(self.weight.device))
        if self.master is not None:
            self.master.copy_(exact)
        self.weight.copy_(exact)

    @torch.no_grad()
    def follow(self) -> None:
        if self.master is not None and self._seen != version(self.weight):
            same = self.master.to(self.weight.dtype) == self.weight  # the master has been written to as well
            self.master = torch.where(same, self.master, self.weight.float())
        super().follow()

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, k={self.k}, select_in={self.select_in}"

    def _from_original(self, weight: Tensor) -> Tensor:
        """A weight ``(out_features, in_features)`` in the coordinates that the form trains."""
        return weight

    def _to_original(self, weight: Tensor) -> Tensor:
        return weight

    def _add(self, targets: Sequence[Tensor], places: Tensor, delta: Tensor) -> None:
        """:meth:`add_together` on the weights, or their masters, of layers like this one, in their dtype."""
        for target, indices, values in zip(targets, places, delta, strict=True):
            target.view(-1).index_add_(0, indices, values)

    def _keep_master(self, original: Tensor | None) -> None:
        """Below float32 an update smaller than about 1e-3 of the weight would vanish: keep a float32 copy."""
        if self.master is None and torch.finfo(self.weight.dtype).bits < 32:
            exact = self.weight.detach().float() if original is None else self._from_original(original.float())
            self.master = exact.to(torch.float32).clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.follow()
        master, self.master, weight = self.master, None, self.weight.detach()
        super()._apply(fn, recurse)
        if torch.finfo(self.weight.dtype).bits < 32:  # cast down, the model keeps what it had
            self.master = (weight if master is None else master).to(self.weight.device, torch.float32)
        elif master is not None:
            with torch.no_grad():
                self.weight.copy_(master)  # the model was cast back up
                self._seen = version(self.weight)
        return self
