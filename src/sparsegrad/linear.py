"""Linear layers whose weight moves in a few entries of a rotated basis (paper, section 3.2 and Table 2).

Selecting layers (:mod:`sparsegrad.selecting`) replace their gradient by k entries of it in the rotated basis. The
parameter is W_rot in the paper's form (:mod:`sparsegrad.rotated`), W in the folded one (:mod:`sparsegrad.folded`); in
exact arithmetic both take the same steps. Truncated layers (:mod:`sparsegrad.truncated`) train the leading block of
W_rot alone; their steps are the same wherever the selected entries lie in that block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.select import Rule, selected


class SparseGradWeight(nn.Parameter):
    """Marks the weight of a SparseGrad layer, so that an optimizer can refuse it without its layer."""


class SparseGradLinear(nn.Module, ABC):
    """What every layer has: one trained parameter, a gradient that may be selected, a way back to ``nn.Linear``.

    Args:
        shape: of the weight, ``(out_features, in_features)``.
        basis: for layers of this kind; None stands for the identity (no rotation).
        k: entries of the gradient kept at every step.
        select: the rule that says which (:data:`sparsegrad.select.Rule`).
        device: of the weight; the basis is moved there, in place, so that layers of a kind go on sharing it.

    Raises:
        ValueError: if the basis has other shapes than the weight.
    """

    bias: nn.Parameter | None

    def __init__(self, shape: tuple[int, int], basis: Basis | None, k: int, select: Rule, device: torch.device) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.k, self.rule = k, select
        self.kind = ""  # set by sparsify: whose basis the layer takes
        self.basis = None if basis is None else fitting_basis(basis, shape, device)
        self._gradient: tuple[Tensor, Tensor] | None = None  # selected: indices and values

    @classmethod
    def options_by(cls, basis: Basis, k: int, **options: Any) -> dict[str, Any]:
        """Options that follow from a basis and the others; ``ranks`` where a layer takes its leading rows alone."""
        return {}

    @property
    @abstractmethod
    def trained(self) -> nn.Parameter:
        """The parameter whose gradient is selected; the only one that an optimizer is given besides the bias."""

    @property
    def selects(self) -> bool:
        """Whether a gradient is replaced by k of its entries before a step."""
        return True

    @property
    @abstractmethod
    def moves_weight(self) -> bool:
        """Whether ``weight`` is no longer, or will not stay, what it was: a checkpoint must hold it."""

    @property
    @abstractmethod
    def plain_dtype(self) -> torch.dtype:
        """Of the weight of :meth:`to_linear`."""

    @abstractmethod
    def add_(self, indices: Tensor, delta: Tensor) -> None:
        """``W_rot.flatten()[indices] += delta``, in the coordinates that the form keeps.

        Args:
            indices: flat, int64 ``(n,)``, no duplicates.
            delta: ``(n,)``.
        """

    @abstractmethod
    def original_weight(self) -> Tensor:
        """The weight in original coordinates, ``(out_features, in_features)``, in float32 at least."""

    def absorb(self) -> None:
        """Called after a step of the whole of :attr:`trained`, for a form that keeps steps elsewhere."""

    def rotated_weight(self) -> Tensor:
        """The weight in rotated coordinates, ``(out_features, in_features)`` or the basis' ranks."""
        weight = self.original_weight()
        return weight if self.basis is None else self.basis.rotate(weight)

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the same function, on the same device."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        weight = self.original_weight().to(self.plain_dtype).clone()
        linear.weight = nn.Parameter(weight, requires_grad=self.trained.requires_grad)
        if self.bias is not None:
            linear.bias = copied(self.bias)
        return linear

    def take_gradient(self) -> tuple[Tensor, Tensor] | None:
        """Select, hand the gradient over, and forget it.

        Returns:
            Flat indices int64 ``(k,)``, ascending, and values ``(k,)`` in rotated coordinates; None without a gradient.

        Raises:
            ValueError: if the gradient is not finite.
        """
        self.select()
        gradient = self._pending()
        self.zero_gradient()
        return gradient

    def selected_gradient(self) -> tuple[Tensor, Tensor] | None:
        """Indices and values of a gradient that is selected already; None where there is none or it is still dense."""
        dense = self.trained.grad is not None and not self.trained.grad.is_sparse
        return None if dense else self._pending()

    def select(self) -> None:
        """Replace a dense gradient by k of its entries in the rotated basis; no effect when that is done.

        Raises:
            RuntimeError: if a gradient was selected before and neither taken nor forgotten.
        """
        dense = self.trained.grad
        if self.selects and dense is not None and not dense.is_sparse:
            self.trained.grad = None
            self.refuse_second_backward(self._pending() is not None)
            self.keep_selected(self._gradient_to_rotated(dense))

    def scale_gradient(self, factor: Tensor | float) -> None:
        """Multiply the selected gradient, for clipping."""
        self.select()
        gradient = self._pending()
        if gradient is not None:
            self._set_pending(gradient[0], gradient[1] * factor)

    def zero_gradient(self) -> None:
        """Forget the gradient, selected or not."""
        self.trained.grad = self._gradient = None

    def _gradient_to_rotated(self, dense: Tensor) -> Tensor:
        """The gradient of :attr:`trained` in rotated coordinates."""
        return dense

    def _pending(self) -> tuple[Tensor, Tensor] | None:
        """Indices and values of the selected gradient, wherever the form keeps them."""
        return self._gradient

    def _set_pending(self, indices: Tensor, values: Tensor) -> None:
        self._gradient = (indices, values)

    def keep_selected(self, G_rot: Tensor) -> None:
        """Select from a gradient in rotated coordinates and hold what is kept."""
        self._set_pending(*selected(G_rot, self.k, self.rule))

    def refuse_second_backward(self, pending: bool) -> None:
        """Raise RuntimeError if a gradient is pending: a second one can't be added to what was selected."""
        if pending:
            raise RuntimeError(
                "a second backward pass met a gradient that no optimizer step has taken. With select_in='backward' "
                "each step is one backward pass: use select_in='step' to accumulate gradients, clip after the last "
                "micro-batch, and give the optimizer sparsegrad.param_groups(model)."
            )


def copied(bias: Tensor) -> nn.Parameter:
    """A parameter of its own, trained where the bias is."""
    return nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)


def fitting_basis(basis: Basis, shape: tuple[int, int], device: torch.device) -> Basis:
    """The basis, checked against the weight's shape and moved to its device."""
    expected = (basis.out_features, basis.in_features)
    if shape != expected:
        raise ValueError(
            f"the basis is for weights of shape {expected}, this weight has {shape}: "
            "it was made for another model or layer kind; run the gradients and basis stages for this model."
        )
    return basis.to(device)


def autocast(x: Tensor) -> Tensor:
    """The input in autocast's dtype where autocast is on, as ``F.linear`` would cast it."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if casts else x
