"""A selected gradient as torch sees it: a tensor of the parameter's shape that holds k entries and nothing else.

It lies in ``.grad``, as every gradient does. So whoever throws gradients away (``model.zero_grad()``, a skipped step,
``torch.autograd.grad`` for an input) throws it away too, and torch's clipping and ``GradScaler`` see it. What would
need the entries that were not kept, such as a second gradient to add or a sum over processes, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_COPIES = {aten.detach, aten.alias, aten.clone}
_ENTRYWISE = {aten.mul_, aten.div_, aten.clamp_, aten.clamp_min_, aten.clamp_max_, aten.neg_}  # zero stays zero
_NORMS = {aten.linalg_vector_norm, aten.norm}
_LISTS = {
    aten._amp_foreach_non_finite_check_and_unscale_,
    aten._foreach_norm,
    aten._foreach_mul_,
    aten._foreach_clamp_min_,
    aten._foreach_clamp_max_,
}

_SECOND = (
    "a second backward pass met a gradient that no optimizer step has taken. With select_in='backward' each step is "
    "one backward pass: use select_in='step' to accumulate gradients, clip after the last micro-batch, and give the "
    "optimizer sparsegrad.param_groups(model)."
)
_UNKNOWN = (
    "{} met the gradient of a SparseGrad weight, of which only the selected entries are held. Under data parallelism "
    "use select_in='step', and give sparsegrad.param_groups(model) to SparseGradAdamW, not the weights to another "
    "optimizer."
)


class CompactGradient(Tensor):
    """k entries of a gradient.

    Args:
        places: flat indices, int64 ``(k,)``, ascending; in a truncated basis of a matrix smaller than ``like``.
        entries: ``(k,)``.
        like: the parameter.

    Attributes:
        finite: whether the entries are known to be finite: torch's functions may have changed them.
    """

    places: Tensor
    entries: Tensor
    finite: bool

    # Every operation comes to __torch_dispatch__, where it is carried out on the entries or refused.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportPrivateUsage, reportAssignmentType]

    @staticmethod
    def __new__(cls: type[CompactGradient], places: Tensor, entries: Tensor, like: Tensor) -> CompactGradient:
        # Declared in the parameter's dtype, as .grad must be; the entries keep the precision of their basis.
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=entries.device)  # pyright: ignore

    def __init__(self, places: Tensor, entries: Tensor, like: Tensor) -> None:
        self.places, self.entries, self.finite = places, entries, True

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"CompactGradient({len(self.entries)} entries of {tuple(self.shape)})"

    def spoil(self) -> CompactGradient:
        """Of a gradient that is not finite places and entries mean nothing: NaN is held in their place."""
        self.places, self.finite = torch.arange(len(self.places), device=self.places.device), False
        self.entries = torch.full_like(self.entries, nan)
        return self

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operation, kwargs = func.overloadpacket, kwargs or {}
        if operation in _LISTS:  # GradScaler and foreach=True give all gradients at once
            return func([_entries(tensor) for tensor in args[0]], *args[1:], **kwargs)
        self, compact = args[0], [value for value in args if isinstance(value, CompactGradient)]
        if len(compact) == 1 and self is compact[0]:
            if operation in _COPIES:
                copy = CompactGradient(self.places, self.entries.clone(), self)
                copy.finite = self.finite
                return copy
            if operation in _NORMS:
                return func(self.entries, *args[1:], **kwargs)
            if operation in _ENTRYWISE:
                func(_entries(self), *args[1:], **kwargs)
                return self
            if operation is aten.zero_:  # of zero_grad(set_to_none=False)
                self.places, self.entries = self.places[:0], self.entries[:0]
                return self
        if operation is aten.add_ and len(compact) == 2 and not len(self.entries):  # zeroed, and then the next one
            self.places, self.entries, self.finite = compact[1].places, compact[1].entries, compact[1].finite
            return self
        raise RuntimeError(_SECOND if operation in (aten.add, aten.add_) else _UNKNOWN.format(operation))


def _entries(gradient: Tensor) -> Tensor:
    """What a function of torch may change in place."""
    if not isinstance(gradient, CompactGradient):
        return gradient
    gradient.finite = False
    return gradient.entries
