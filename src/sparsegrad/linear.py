"""Linear layers whose weight moves in a few entries of a rotated basis (paper, section 3.2 and Table 2).

Selecting layers (:mod:`sparsegrad.selecting`) replace their gradient by k entries of it in the rotated basis. The
parameter is W_rot in the paper's form (:mod:`sparsegrad.rotated`), W in the folded one (:mod:`sparsegrad.folded`); in
exact arithmetic both take the same steps. Truncated layers (:mod:`sparsegrad.truncated`) train the leading block of
W_rot alone; their steps are the same wherever the selected entries lie in that block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from sparsegrad.basis import Basis
from sparsegrad.compact import CompactGradient
from sparsegrad.fingerprint import fingerprint
from sparsegrad.origin import Origin
from sparsegrad.select import NonFiniteGradient, Rule, insert_sorted, selected
from sparsegrad.state import Places
from sparsegrad.unmerged import mark, take_moved, unmark

REPLACED = (
    "the weights of {} are no longer those of their SparseGrad layers, whole: FSDP and DeepSpeed cut weights in parts, "
    "but entries are selected from a whole matrix (use DistributedDataParallel); load_state_dict(assign=True) puts "
    "others in their place (make the optimizer after it, without assign)."
)


class SparseGradWeight(nn.Parameter):
    """Marks the weight of a SparseGrad layer, so that an optimizer can refuse it without its layer.

    Attributes:
        away: whether its layer was taken out of the model, so that no step of it is wanted.
    """

    away = False

    def __new__(  # pyright: ignore[reportInconsistentConstructor] - torch's stub gives data a default in __init__
        cls, data: Tensor, requires_grad: bool = True
    ) -> Self:
        _watch_optimizers()
        return super().__new__(cls, data, requires_grad)

    def __reduce_ex__(self, proto: Any) -> Any:  # torch's own gives a plain parameter back
        return type(self), (self.data, self.requires_grad)


@cache
def _watch_optimizers() -> RemovableHandle:
    """Once a process: no weight can tell who moves it, since torch's fused kernels leave no trace of that."""
    return register_optimizer_step_pre_hook(_refuse_weights_without_layers)


def _refuse_weights_without_layers(optimizer: Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        weights = [p for p in group["params"] if isinstance(p, SparseGradWeight)]
        if any(weight.away for weight in weights):
            raise ValueError(
                f"{type(optimizer).__name__} holds the weights of layers that were taken out of the model: another "
                "adapter was set, or this one is merged, disabled or unloaded. Put it back, or make a new optimizer "
                "of sparsegrad.param_groups(model)."
            )
        if weights and not group.get("sparsegrad"):
            raise ValueError(
                f"{type(optimizer).__name__} holds the weights of SparseGrad layers, which it would fine-tune in full: "
                "give SparseGradAdamW(sparsegrad.param_groups(model)) in its place (to a Trainer as optimizers=)."
            )


class SparseGradLinear(nn.Module, ABC):
    """What every layer has: one trained parameter, a gradient that may be selected, a way back to ``nn.Linear``.

    Args:
        shape: of the weight, ``(out_features, in_features)``.
        basis: for layers of this kind; None stands for the identity (no rotation).
        k: entries of the gradient kept at every step.
        select: the rule that says which (:data:`sparsegrad.select.Rule`).
        device: of the weight; the basis is moved there, in place, so that layers of a kind go on sharing it.

    Attributes:
        kind, name: of the layer: whose basis it takes, and how the model calls it.
        start: fingerprint of the weight as the layer was made.
        base: fingerprints of the plain model that the layer was made in, by name.
        arguments: what :func:`sparsegrad.sparsify` was given, but bases and rule; as JSON keeps it, one object for all.
        origin: what stood in the layer's place; None stands for an ``nn.Linear``, or an expert of a parameter.

    Raises:
        ValueError: if the basis has other shapes than the weight.
    """

    bias: nn.Parameter | None

    def __init__(self, shape: tuple[int, int], basis: Basis | None, k: int, select: Rule, device: torch.device) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.k, self.rule = k, select
        self.kind = self.name = self.start = ""  # set by sparsify
        self.base: Mapping[str, str] = {}  # likewise
        self.arguments: Mapping[str, Any] = {}  # likewise
        self.origin: Origin | None = None  # likewise
        self.basis = None if basis is None else fitting_basis(basis, shape, device)
        self._moved: Tensor | None = torch.empty(0, dtype=torch.int64, device=device)
        self._moving: tuple[Places, int] | None = None  # an optimizer's notes of what it moves, and the place in them
        self._seen = (0, 0, 0)  # of the weight, after the latest step
        self.register_state_dict_post_hook(mark)
        self.register_load_state_dict_pre_hook(unmark)
        self.register_load_state_dict_post_hook(take_moved)
        self.loaded: Tensor | None = None  # between these two

    @classmethod
    def options_by(cls, basis: Basis, k: int, **options: Any) -> dict[str, Any]:
        """Options that follow from a basis and the others; ``ranks`` where a layer takes its leading rows alone."""
        return {}

    @property
    @abstractmethod
    def trained(self) -> nn.Parameter:
        """The parameter whose gradient is selected; the only one that an optimizer is given besides the bias."""

    @property
    def stored(self) -> Tensor:
        """``weight``, as the form keeps it: a parameter, or its linear's."""
        return cast(Tensor, self.weight)

    @property
    def rotated_shape(self) -> tuple[int, int]:
        """Of a gradient in rotated coordinates."""
        return (self.out_features, self.in_features) if self.basis is None else self.basis.ranks

    @property
    def selects(self) -> bool:
        """Whether a gradient is replaced by k of its entries before a step."""
        return True

    @property
    def pass_waits_for(self) -> str:
        """What a forward or backward pass waits for the device for, which no CUDA graph can hold; mostly nothing."""
        return ""

    @property
    @abstractmethod
    def moves_weight(self) -> bool:
        """Whether ``weight`` is no longer, or will not stay, what it was: a checkpoint must hold it."""

    @property
    def plain_state(self) -> bool:
        """Whether what a state dictionary holds as ``weight`` is the plain layer's (:mod:`sparsegrad.unmerged`)."""
        return True

    @property
    @abstractmethod
    def plain_dtype(self) -> torch.dtype:
        """Of the weight of :meth:`to_linear`."""

    @abstractmethod
    def add_(self, indices: Tensor, delta: Tensor) -> None:
        """``W_rot.flatten()[indices] += delta``, in the coordinates that the form keeps.

        Args:
            indices: flat, int64 ``(n,)``, ascending, no duplicates.
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

    def owns(self, parameter: Tensor) -> bool:
        """Whether it is :attr:`trained`, as it was made: not another one, nor a part of it."""
        return isinstance(parameter, SparseGradWeight) and parameter is self.trained and parameter.dim() == 2

    def take_gradient(self) -> tuple[Tensor, Tensor] | None:
        """Select, hand the gradient over, and forget it.

        Returns:
            Flat indices int64 ``(k,)``, ascending, and values ``(k,)`` in rotated coordinates; None without a gradient.

        Raises:
            NonFiniteGradient: if the gradient is not finite.
        """
        self.select()
        gradient, self.trained.grad = self.trained.grad, None
        if isinstance(gradient, CompactGradient):
            return gradient.places, gradient.entries
        if gradient is None:
            return None
        return torch.arange(gradient.numel(), device=gradient.device), gradient.flatten()  # nothing is selected

    def select(self) -> None:
        """Replace a dense gradient by k of its entries in the rotated basis; no effect when that is done.

        Raises:
            NonFiniteGradient: if the gradient is not finite.
        """
        gradient = self.trained.grad
        if self.selects and gradient is not None and not isinstance(gradient, CompactGradient):
            self.trained.grad = None
            self.trained.grad = gradient = self.compact(self.rotated_gradients([self], [gradient])[0])
        if isinstance(gradient, CompactGradient) and not gradient.finite and not gradient.entries.isfinite().all():
            self.trained.grad = None
            raise NonFiniteGradient(self.name)

    def scale_gradient(self, factor: Tensor | float) -> None:
        """Multiply the selected gradient by a finite factor, for clipping."""
        self.select()
        gradient = self.trained.grad
        if isinstance(gradient, CompactGradient):
            gradient.entries = gradient.entries * factor
        elif gradient is not None:
            self.trained.grad = gradient * factor

    def zero_gradient(self) -> None:
        """Forget the gradient, selected or not."""
        self.trained.grad = None

    def compact(self, G_rot: Tensor) -> CompactGradient:
        """Select from a gradient in rotated coordinates.

        Of one that is not finite NaN is kept: a GradScaler must see it to skip the step, and a step alone refuses it.
        """
        places, values, finite = selected(G_rot.detach()[None], self.k, self.rule)
        found = CompactGradient(places[0], values[0], self.trained)
        return found if finite else found.spoil()

    # ---- several layers at once: those whose `likeness` is equal ----

    @property
    def likeness(self) -> tuple[object, ...]:
        """What layers that are stepped together have in common."""
        trained = self.trained
        return type(self), self.kind, id(self.basis), trained.shape, trained.dtype, trained.device, self.k, self.rule

    @staticmethod
    def rotated_gradients(layers: Sequence[Any], gradients: list[Tensor]) -> Tensor:
        """Dense gradients of :attr:`trained` in rotated coordinates, ``(layers, rows, columns)``; empties the list."""
        stacked = torch.stack(gradients)
        gradients.clear()
        return stacked

    @staticmethod
    def add_together(layers: Sequence[Any], places: Tensor, delta: Tensor) -> None:
        """:meth:`add_` of several layers; ``(layers, k)`` both."""
        for layer, indices, values in zip(layers, places, delta, strict=True):
            layer.add_(indices, values)

    # ---- what others do to the weights ----

    def follow(self) -> None:
        """After others have written to the weight (``load_state_dict``): all of it may differ from the base.

        Unless they wrote what was there: DistributedDataParallel begins with that.
        """
        if self._seen != version(self.stored):
            self._seen = version(self.stored)
            if (moved := self.moved) is not None and (len(moved) or fingerprint(self.stored) != self.start):
                self.moved = None

    @property
    def moved(self) -> Tensor | None:
        """Flat indices, int64 and ascending, of the entries in rotated coordinates that steps have moved.

        None where others have written to the weight, so that any may differ from the base.
        """
        if self._moving is not None and self._moved is not None:
            places, number = self._moving
            self._moved = insert_sorted(self._moved, places.of(number).to(self._moved.device))[0]
        return self._moved

    @moved.setter
    def moved(self, indices: Tensor | None) -> None:
        self._moved, self._moving = indices, None

    def note_moved(self, indices: Tensor) -> None:
        """Add to :attr:`moved` flat indices, ascending."""
        if self._moved is not None:
            self._moved = insert_sorted(self._moved, indices)[0]

    def watch(self, places: Places, number: int) -> None:
        """Count what an optimizer notes from now on to :attr:`moved`: asked for when it is wanted, not at each step."""
        if self._moved is not None and (self._moving is None or self._moving[0] is not places):
            self.moved = self.moved  # what another one has noted so far
            self._moving = places, number

    def borrow_basis(self) -> None:
        """Hold the basis without registering it: another layer does, and a state dictionary holds it once."""
        vars(self)["basis"] = self._modules.pop("basis")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.follow()
        super()._apply(fn, recurse)
        self._seen = version(self.stored)
        if self.basis is not None and self.basis.U.device != self.trained.device:
            self.basis.to(self.trained.device)  # a borrowed one whose owner does not come along
        moved = self.moved
        self.moved = None if moved is None else moved.to(self.trained.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.follow()
        return self.__dict__ | {"_moved": self.moved, "_moving": None}  # this layer's optimizer goes on

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = version(self.stored)  # copies of tensors count from zero


def version(tensor: Tensor) -> tuple[int, int, int]:
    """Another one after the tensor or its ``data`` is replaced, or it is written to in place.

    In inference mode, and of what is written to ``data``, nothing is counted.
    """
    address = 0 if hasattr(tensor, "__tensor_flatten__") else tensor.data_ptr()  # several tensors have several
    return id(tensor), address, 0 if tensor.is_inference() else tensor._version


def copied(bias: Tensor) -> nn.Parameter:
    """A parameter of its own, trained where the bias is."""
    return nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)


def fitting_basis(basis: Basis, shape: tuple[int, int], device: torch.device) -> Basis:
    """The basis, checked against the weight's shape and moved to its device."""
    expected = (basis.out_features, basis.in_features)
    if shape != expected:
        raise ValueError(
            f"the basis is for weights of shape {expected}, this weight has {shape}: "
            "it was made for another model or layer kind; make one for this: hosvd of what collect_moments gives."
        )
    return basis.to(device)


def autocast(x: Tensor) -> Tensor:
    """The input in autocast's dtype where autocast is on, as ``F.linear`` would cast it."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if casts else x
