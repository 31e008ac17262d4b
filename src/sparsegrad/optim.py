"""One optimizer for a SparseGrad model (paper, section 3.2; D8, D9).

Dense groups follow ``torch.optim.AdamW``. The weights of SparseGrad layers follow lazy Adam, the rule of
``torch.optim.SparseAdam``: moments move only where the gradient holds an entry, the step count is the parameter's own.
``SparseAdam`` keeps two dense moments as large as the weight; here the state holds the entries touched so far. Layers
that are alike are stepped together (:mod:`sparsegrad.grouped`, :mod:`sparsegrad.state`). The core of a truncated layer
has a gradient for every entry at every step, so it follows AdamW (without weight decay, bias corrected), unless it
selects: then lazy Adam, as everything that selects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import inf
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from sparsegrad import foreach, kernels
from sparsegrad.family import Family, family_key
from sparsegrad.grouped import Selected, all_finite, refuse_non_finite, take_selected
from sparsegrad.linear import REPLACED, SparseGradLinear, SparseGradWeight, version
from sparsegrad.select import top_k
from sparsegrad.state import MOMENTS, CompactMoments, DenseMoments


def lazy_adam_delta(
    m: Tensor, v: Tensor, g: Tensor, step: int | Tensor, lr: float | Tensor, betas: tuple[float, float], eps: float
) -> Tensor:
    """Update moments in place and return what to add to the weights, for the entries given.

    The rule is ``torch.optim.SparseAdam``'s, eps outside the bias correction as there.

    Args:
        m, v, g: ``(n,)`` or ``(layers, n)``, first and second moments and gradient of n entries.
        step: optimizer steps of this parameter, this one included; from 1; or of each layer, float64 ``(layers, 1)``.
    """
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.lerp_(g * g, 1 - beta2)
    size = -lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    return (size.to(g.dtype) if isinstance(size, Tensor) else size) * m / (v.sqrt() + eps)


class SparseGradAdamW(Optimizer):
    """AdamW for dense groups, lazy Adam with compact state for SparseGrad weights.

    Args:
        params: from :func:`sparsegrad.param_groups`. A group with the key ``layers`` (one SparseGrad layer for each of
            its parameters) is a SparseGrad group.
        lr: learning rate of groups that name none.
        betas, eps: as in ``torch.optim.AdamW``, for both kinds.
        weight_decay: for dense groups; lazy Adam has none, as SparseAdam has none (D9).
        fused: use torch's fused AdamW kernel for dense groups (CPU and CUDA); several times faster.
        drop_after: drop the state of an entry that was not selected for so many steps, so that the state stops growing;
            selected again, its moments start from zero. None keeps every entry, as the paper's SparseAdam does.

    Raises:
        ValueError: on hyper-parameters out of range, a SparseGrad group with weight decay, or a SparseGrad weight whose
            layer is not given.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = False,
        drop_after: int | None = None,
        moments: str = "compact",
    ) -> None:
        if not all(0 <= value < inf for value in (lr, eps, weight_decay)):
            raise ValueError(f"lr={lr}, eps={eps}, weight_decay={weight_decay}; each must be finite, none negative.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}; each must lie in [0, 1).")
        if drop_after is not None and (type(drop_after) is not int or drop_after < 1):
            raise ValueError(f"drop_after={drop_after!r}; it must be a whole number of steps, at least 1, or None.")
        if moments not in MOMENTS or (moments == "dense" and drop_after is not None):
            raise ValueError(f"moments={moments!r}; allowed: {', '.join(MOMENTS)}; drop_after needs compact ones.")
        self._fused = fused
        self._new_moments = partial(CompactMoments, drop_after=drop_after) if moments == "compact" else DenseMoments
        self._layers: dict[Tensor, SparseGradLinear] = {}
        self._families: dict[tuple[object, ...], Family] = {}  # of lazy Adam
        self._flags: list[
            tuple[list[SparseGradLinear], Tensor]
        ] = []  # whether gradients of the latest step were finite
        self._versions: dict[Tensor, tuple[int, int, int]] = {}  # of parameters with a master, after their latest step
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for SparseGrad groups."""
        param_group = dict(param_group)
        layers = list(param_group.pop("layers", ()))
        parameters = param_group["params"]
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        param_group["params"], param_group["sparsegrad"] = parameters, bool(layers)
        if layers:
            if [id(p) for p in parameters] != [id(layer.trained) for layer in layers]:
                raise ValueError(
                    "a SparseGrad group needs 'layers': one for each of its parameters, in the same order."
                )
            if param_group.setdefault("weight_decay", 0.0) != 0:
                raise ValueError("lazy Adam has no weight decay: give weight_decay to the dense groups only.")
            self._layers.update(zip(parameters, layers, strict=True))
            for layer in filter(lambda layer: layer.selects, layers):
                self._families.setdefault(family_key(len(self.param_groups), layer), Family()).add(layer)
        elif any(isinstance(p, SparseGradWeight) for p in parameters):
            raise ValueError(
                "a dense group holds the weight of a SparseGrad layer, which would be fine-tuned in full: "
                "give the optimizer sparsegrad.param_groups(model), not model.parameters()."
            )
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those that layers hold in compact form too."""
        super().zero_grad(set_to_none)
        for layer in self._layers.values():
            layer.zero_gradient()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which is made together with its model: what torch's holds, and the layers with their moments."""
        own = ("_fused", "_new_moments", "_layers", "_families")
        return super().__getstate__() | {name: vars(self)[name] for name in own} | {"_flags": [], "_versions": {}}

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a step: the kernels are fused, and selection waits for nothing.

        Before a replay :meth:`reserve` is for the caller, and after it :meth:`refuse_non_finite`.
        """
        selecting = [layer for layer in self._layers.values() if layer.selects]
        return self._fused and all(layer.rule is top_k and kernels.selects(layer.trained) for layer in selecting)

    def reserve(self) -> tuple[int, ...]:
        """Make room for the state of the next steps; another result than before if tensors were replaced for it."""
        held = [family.moments for family in self._families.values() if family.moments is not None]
        for moments in held:
            moments.reserve(ahead=True)
        return tuple(moments.replaced for moments in held)

    def refuse_non_finite(self) -> None:
        """See that the gradients of the latest step were finite: of one that is not, a fused step changes nothing.

        Raises:
            NonFiniteGradient: if one was not.
        """
        refuse_non_finite(self._flags)

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] - of its two overloads the wider one
        self, closure: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        """One step; the SparseGrad gradients are taken from their layers.

        Raises:
            ValueError: if a SparseGrad gradient is not finite (the model is as it was), or weights were put in the
                place of the layers'.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            if group["sparsegrad"] and not all(p in self._layers and self._layers[p].owns(p) for p in group["params"]):
                raise ValueError(REPLACED.format(f"group {number}"))
        found = self._select()
        skip = None
        if self._fused and self._flags and self._flags[0][1].is_cuda:  # decided on the device: no wait before the end
            skip = 1 - all_finite(self._flags).float()
        else:
            self.refuse_non_finite()
        for number, group in enumerate(self.param_groups):
            dense = [p for p in group["params"] if p.grad is not None]
            self._step_dense(group, dense, skip)
            for parameter in dense if group["sparsegrad"] else ():
                self._layers[parameter].absorb()
            begun: set[Family] = set()
            for one in found[number]:
                family = self._families[family_key(number, one.layers[0])]
                if family not in begun:  # layers of a family may be stepped in several parts
                    self._begin(family, one.values)
                    begun.add(family)
                self._step_sparse(one, group, family, skip)
        if skip is not None and not torch.cuda.is_current_stream_capturing():
            self.refuse_non_finite()
        return loss

    def _select(self) -> list[list[Selected]]:
        """Take what is kept of the gradients of each group, and note what tells whether all are finite."""
        layers = [[self._layers[p] for p in group["params"] if p in self._layers] for group in self.param_groups]
        found = [take_selected([layer for layer in own if layer.selects]) for own in layers]
        self._flags = [(one.layers, one.finite) for group in found for one in group]
        cores = [layer for own in layers for layer in own if layer.trained.grad is not None]
        if cores:
            norms = foreach.norms([cast(Tensor, layer.trained.grad) for layer in cores])
            self._flags.append((cores, torch.isfinite(torch.stack(norms))))
        return found

    def _is_lazy(self, parameter: Tensor) -> bool:
        return parameter in self._layers and self._layers[parameter].selects

    def _begin(self, family: Family, values: Tensor) -> None:
        """Once a step, before the moments of a family are taken."""
        moments = family.made(self._new_moments, values.to(torch.promote_types(values.dtype, torch.float32)))
        if not (values.is_cuda and torch.cuda.is_current_stream_capturing()):
            moments.reserve()
        moments.begin()

    def _step_sparse(self, one: Selected, group: dict[str, Any], family: Family, skip: Tensor | None) -> None:
        """Lazy Adam's step of layers that are alike; nothing changes where ``skip`` is 1."""
        layers, places = one.layers, one.places
        skip = None if skip is None else skip.to(places.device)
        g = one.values.to(torch.promote_types(layers[0].trained.dtype, torch.float32))
        moments = family.made(self._new_moments, g)
        if skip is not None:  # where selection was undone by NaN, keys that are keys
            places = torch.where(skip > 0, torch.arange(places.shape[1], device=g.device), places)
        rows = family.rows(layers)
        at, m, v = moments.take((places + rows[:, None] * family.entries).flatten())
        family.steps[rows] += 1 if skip is None else 1 - skip
        before = (m.clone(), v.clone())
        m, v = m.view_as(g), v.view_as(g)
        delta = lazy_adam_delta(m, v, g, family.steps[rows], group["lr"], group["betas"], group["eps"])
        m, v = m.flatten(), v.flatten()
        if skip is not None:
            m, v = (torch.where(skip > 0, old, new) for old, new in zip(before, (m, v), strict=True))
            delta = torch.where(skip > 0, 0, delta)
        moments.put(at, m, v)
        for layer in layers:
            layer.watch(moments.moved, family.numbers[layer.trained])
        layers[0].add_together(layers, places, delta)

    def _step_dense(self, group: dict[str, Any], parameters: list[nn.Parameter], skip: Tensor | None) -> None:
        """AdamW's step of parameters that have a gradient; nothing changes where ``skip`` is 1."""
        weights: list[Tensor] = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                precision = torch.promote_types(parameter.dtype, torch.float32)
                state["step"] = torch.tensor(0.0, device=parameter.device if self._fused else "cpu")
                state["exp_avg"] = torch.zeros_like(parameter, dtype=precision)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=precision)
                if parameter.dtype != precision:  # bfloat16 swallows small updates: step a float32 master
                    state["master"] = parameter.detach().to(precision)
            elif "master" in state and self._versions.get(parameter) != version(parameter):
                same = state["master"].to(parameter.dtype) == parameter  # else others have written to it: follow
                state["master"] = torch.where(same, state["master"], parameter.to(state["master"].dtype))
            weights.append(state.get("master", parameter))
        states, gradients = [self.state[p] for p in parameters], [cast(Tensor, p.grad) for p in parameters]
        adamw(
            weights,
            [g if g.dtype == w.dtype else g.to(w.dtype) for g, w in zip(gradients, weights, strict=True)],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            foreach=False if self._fused else None,
            fused=self._fused or None,  # None, not False: torch chooses foreach by device only if both are None
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            found_inf=skip,
        )
        for parameter, weight in zip(parameters, weights, strict=True):
            if weight is not parameter:
                parameter.copy_(weight)
                self._versions[parameter] = version(parameter)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, by parameter; of a SparseGrad weight ``indices``, ``exp_avg`` and ``exp_avg_sq``."""
        found = super().state_dict()
        order = [index for group in found["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        index_of = dict(zip(parameters, order, strict=True))
        found["state"] = dict(found["state"])
        for family in self._families.values():
            found["state"] |= {index_of[parameter]: own for parameter, own in family.export().items()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; indices, moments and masters keep their own dtypes.

        Raises:
            ValueError: if the groups are another model's.
        """
        self._hand_over()
        super().load_state_dict(state_dict)
        # torch casts every state tensor to the parameter's dtype, which would destroy indices and masters.
        saved = state_dict["state"]
        order = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        lazy: dict[Tensor, dict[str, Tensor]] = {}
        for index, parameter in zip(order, parameters, strict=True):
            for key, value in saved.get(index, {}).items():
                on_cpu = key == "step" and (self._is_lazy(parameter) or not self._fused)
                device = "cpu" if on_cpu else parameter.device
                self.state[parameter][key] = value.to(device=device, copy=True)
            if self._is_lazy(parameter):
                lazy[parameter] = self.state.pop(parameter, {})
        for family in self._families.values():
            family.load({p: own for p, own in lazy.items() if own and p in family.numbers}, self._new_moments)

    def forget(self, layer: SparseGradLinear) -> None:
        """Drop the state of a layer: its moments and step count start anew."""
        self._hand_over()
        self.state.pop(layer.trained, None)
        for family in self._families.values():
            if layer.trained in family.numbers:
                family.load({p: own for p, own in family.export().items() if p is not layer.trained}, self._new_moments)

    def _hand_over(self) -> None:
        """Before moments are replaced: layers hold themselves what was moved, for their adapter."""
        for layer in self._layers.values():
            layer.moved = layer.moved

    def moment_bytes(self) -> int:
        """Of what is held for SparseGrad weights besides :attr:`state`: entries and their places, without free room."""
        return sum(family.moments.nbytes() for family in self._families.values() if family.moments)

    def touched(self, layer: SparseGradLinear) -> Tensor:
        """Flat indices, int64 and ascending, of the entries that steps have moved and that still have a state."""
        if self.state.get(layer.trained) and not layer.selects:
            return torch.arange(layer.trained.numel(), device=layer.trained.device)
        for family in self._families.values():
            if layer.trained in family.numbers and family.moments is not None:
                return family.moments.touched.of(family.numbers[layer.trained])
        return torch.empty(0, dtype=torch.int64, device=layer.trained.device)
