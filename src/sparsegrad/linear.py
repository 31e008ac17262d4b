"""Linear layers whose weight moves in a few entries of a rotated basis (paper, section 3.2 and Table 2).

Two forms of one layer; in exact arithmetic they take the same steps:

- :class:`~sparsegrad.rotated.RotatedLinear`, the paper's: the parameter is W_rot.
- :class:`~sparsegrad.folded.FoldedLinear`: the parameter is W and stays in place.

A third, :class:`~sparsegrad.truncated.TruncatedLinear`, trains the leading block of W_rot alone and never forms the
rest of its gradient; it takes the same steps wherever the selected entries lie in that block.

Selecting a gradient means to replace it by its top k entries in the rotated basis. It happens once a step, after all
micro-batches and ranks are summed, so the result does not depend on how a batch is cut (``select_in="step"``). Where
a batch is one backward pass, ``select_in="backward"`` selects layer by layer and never keeps the dense gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.select import check_k, top_k

SELECT_IN = ("step", "backward")


class SparseGradWeight(nn.Parameter):
    """Marks the weight of a SparseGrad layer, so that an optimizer can refuse it without its layer."""


class SparseGradLinear(nn.Module):
    """What all forms share: shapes, the shared basis, the pending gradient, float32 masters.

    Args:
        weight: ``(out_features, in_features)``, in original coordinates.
        bias: ``(out_features,)`` or None; always in original coordinates (D7).
        basis: for layers of this kind; None stands for the identity (no rotation).
        k: entries of the gradient kept at every step.
        select_in: ``step`` (safe everywhere) or ``backward`` (one backward pass a step, no dense gradient kept).

    Raises:
        ValueError: if the basis has other shapes than the weight, k is out of range, or an option is unknown.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, basis: Basis | None, k: int, *, select_in: str = "step"
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.k = check_k(k, tuple(weight.shape))
        if select_in not in SELECT_IN:
            raise ValueError(f"select_in={select_in!r}; allowed: {', '.join(SELECT_IN)}.")
        self.select_in = select_in
        self.kind: str | None = None  # set by sparsify: whose basis the layer takes
        self.basis = None if basis is None else fitting_basis(basis, tuple(weight.shape), weight.device)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.register_buffer("master", None)
        self.weight = self._held_weight(weight)
        self._keep_master(weight.detach())

    @property
    def trained(self) -> nn.Parameter:
        """The parameter whose gradient is selected; the only one that an optimizer is given besides the bias."""
        return self.weight

    @property
    def selects(self) -> bool:
        """Whether a gradient is replaced by its top k entries before a step."""
        return True

    @property
    def moves_weight(self) -> bool:
        """Whether ``weight`` is no longer, or will not stay, what it was: a checkpoint must hold it."""
        return self.weight.requires_grad

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
        """Replace a dense gradient by its top k entries in the rotated basis; no effect when that is done.

        Raises:
            RuntimeError: if a gradient was selected before and neither taken nor forgotten.
        """
        dense = self.trained.grad
        if dense is not None and not dense.is_sparse:
            self.trained.grad = None
            self._refuse_second_backward(self._pending() is not None)
            self._set_pending(*self._top_k(self._gradient_to_rotated(dense)))

    def scale_gradient(self, factor: Tensor | float) -> None:
        """Multiply the selected gradient, for clipping."""
        self.select()
        gradient = self._pending()
        if gradient is not None:
            self._set_pending(gradient[0], gradient[1] * factor)

    @torch.no_grad()
    def add_(self, indices: Tensor, delta: Tensor) -> None:
        """``W_rot.flatten()[indices] += delta``, in the coordinates that the form keeps.

        Args:
            indices: flat, int64 ``(n,)``, no duplicates.
            delta: ``(n,)``.
        """
        self._keep_master(None)
        target = self.weight if self.master is None else self.master
        self._add(target, indices, delta.to(target.dtype))
        if self.master is not None:
            self.weight.copy_(self.master)

    def original_weight(self) -> Tensor:
        """The weight in original coordinates, ``(out_features, in_features)``, in master precision."""
        weight = self.weight if self.master is None else self.master
        return self._to_original(weight.detach())

    def rotated_weight(self) -> Tensor:
        """The weight in rotated coordinates, ``(out_features, in_features)``."""
        weight = self.original_weight()
        return weight if self.basis is None else self.basis.rotate(weight)

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the same function, on the same device and in the same dtype."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        weight = self.original_weight().to(self.weight.dtype).clone()
        linear.weight = nn.Parameter(weight, requires_grad=self.trained.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear

    def zero_gradient(self) -> None:
        """Forget the gradient, selected or not."""
        self.trained.grad = None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, k={self.k}, select_in={self.select_in}"
        )

    def _held_weight(self, weight: Tensor) -> nn.Parameter:
        return SparseGradWeight(self._from_original(weight.detach()).to(weight.dtype).clone())

    # A form says how these are done.
    def _from_original(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _to_original(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _gradient_to_rotated(self, dense: Tensor) -> Tensor:
        raise NotImplementedError

    def _pending(self) -> tuple[Tensor, Tensor] | None:
        raise NotImplementedError

    def _set_pending(self, indices: Tensor, values: Tensor) -> None:
        raise NotImplementedError

    def _add(self, target: Tensor, indices: Tensor, delta: Tensor) -> None:
        raise NotImplementedError

    def _top_k(self, G_rot: Tensor) -> tuple[Tensor, Tensor]:
        indices = top_k(G_rot, self.k)
        return indices, G_rot.flatten()[indices]

    def _keep_master(self, original: Tensor | None) -> None:
        """Below float32 an update smaller than about 1e-3 of the weight would vanish: keep a float32 copy."""
        if self.master is None and torch.finfo(self.weight.dtype).bits < 32:
            exact = self.weight.detach().float() if original is None else self._from_original(original.float())
            self.master = exact.to(torch.float32).clone()

    def _refuse_second_backward(self, pending: bool) -> None:
        if pending:
            raise RuntimeError(
                "a second backward pass met a gradient that no optimizer step has taken. With select_in='backward' "
                "each step is one backward pass: use select_in='step' to accumulate gradients, clip after the last "
                "micro-batch, and give the optimizer sparsegrad.param_groups(model)."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseGradLinear:
        master, self.master = self.master, None
        super()._apply(fn, recurse)
        if torch.finfo(self.weight.dtype).bits < 32:
            self.master = None if master is None else master.to(fn(master).device)
            self._keep_master(None)  # the model was cast down
        elif master is not None:
            with torch.no_grad():
                self.weight.copy_(master)  # the model was cast back up
        return self


def fitting_basis(basis: Basis, shape: tuple[int, int], device: torch.device) -> Basis:
    """The basis, checked against the weight's shape and moved to its device.

    Layers of a kind are given one object, and it is changed in place, so that they go on sharing it.
    """
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
