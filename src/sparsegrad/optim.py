"""One optimizer for a SparseGrad model (paper, section 3.2; D8, D9).

Dense groups follow ``torch.optim.AdamW``. The weights of SparseGrad layers follow lazy Adam, the rule of
``torch.optim.SparseAdam``: moments move only where the gradient holds an entry, the step count is the parameter's own.
``SparseAdam`` keeps two dense moments as large as the weight; here the state holds the entries touched so far and
nothing else. The core of a truncated layer has a gradient for every entry at every step, so it follows AdamW (without
weight decay, bias corrected), unless it selects: then lazy Adam, as everything that selects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from sparsegrad.compact import CompactGradient
from sparsegrad.linear import SparseGradLinear, SparseGradWeight, version
from sparsegrad.select import NonFiniteGradient, insert_sorted


def lazy_adam_delta(
    m: Tensor, v: Tensor, g: Tensor, step: int, lr: float, betas: tuple[float, float], eps: float
) -> Tensor:
    """Update moments in place and return what to add to the weights, for the entries given.

    The rule is ``torch.optim.SparseAdam``'s, eps outside the bias correction as there.

    Args:
        m, v, g: ``(n,)``, first and second moments and gradient of n entries.
        step: optimizer steps of this parameter, this one included; from 1.
    """
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.lerp_(g * g, 1 - beta2)
    step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    return -step_size * m / (v.sqrt() + eps)


_REPLACED = (
    "the weights of {} are no longer those of their SparseGrad layers: FSDP and DeepSpeed, which cut weights in parts, "
    "are not supported, nor is load_state_dict(assign=True)."
)


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
    ) -> None:
        if not all(0 <= value < inf for value in (lr, eps, weight_decay)):
            raise ValueError(f"lr={lr}, eps={eps}, weight_decay={weight_decay}; each must be finite, none negative.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}; each must lie in [0, 1).")
        if drop_after is not None and (type(drop_after) is not int or drop_after < 1):
            raise ValueError(f"drop_after={drop_after!r}; it must be a whole number of steps, at least 1, or None.")
        self._fused, self._drop_after = fused, drop_after
        self._layers: dict[Tensor, SparseGradLinear] = {}
        self._versions: dict[Tensor, tuple[int, int]] = {}  # of parameters with a master, after their latest step
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

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride] - of its two overloads the wider one
        self, closure: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        """One step; the SparseGrad gradients are taken from their layers.

        Raises:
            ValueError: if a SparseGrad gradient is not finite, or weights were put in the place of the layers'.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _select(self._layers.values())  # all before any update: one that is not finite leaves the model as it was
        for number, group in enumerate(self.param_groups):
            if group["sparsegrad"] and not all(p in self._layers for p in group["params"]):
                raise ValueError(_REPLACED.format(f"group {number}"))
            dense = [p for p in group["params"] if p.grad is not None and not self._is_lazy(p)]
            self._step_dense(group, dense)
            for parameter in dense if group["sparsegrad"] else ():
                self._layers[parameter].absorb()
            for parameter in filter(self._is_lazy, group["params"]):
                self._step_sparse(self._layers[parameter], group)
        return loss

    def _is_lazy(self, parameter: Tensor) -> bool:
        return parameter in self._layers and self._layers[parameter].selects

    def _step_sparse(self, layer: SparseGradLinear, group: dict[str, Any]) -> None:
        parameter, gradient = layer.trained, layer.take_gradient()
        if gradient is None:
            return
        indices, g = gradient
        precision = torch.promote_types(parameter.dtype, torch.float32)
        g = g.to(precision)
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["indices"], state["exp_avg"], state["exp_avg_sq"] = indices[:0], g[:0], g[:0]
        state["step"] += 1
        if self._drop_after is not None:
            self._drop(state, self._drop_after)
        held = state["indices"]
        union, place_old, place = insert_sorted(held, indices)
        if len(union) > len(held):
            for key in state.keys() & {"exp_avg", "exp_avg_sq", "last"}:
                state[key] = state[key].new_zeros(len(union)).index_copy_(0, place_old, state[key])
            state["indices"] = union
        if "last" in state:
            state["last"][place] = int(state["step"])
        m, v = state["exp_avg"][place], state["exp_avg_sq"][place]
        delta = lazy_adam_delta(m, v, g, int(state["step"]), group["lr"], group["betas"], group["eps"])
        state["exp_avg"][place], state["exp_avg_sq"][place] = m, v
        layer.add_(indices, delta, held=held, union=state["indices"])

    @staticmethod
    def _drop(state: dict[str, Any], after: int) -> None:
        """Forget entries whose last step, int32, lies too far back; the step that begins counts already."""
        if "last" not in state:  # a state that was kept without this option: all as if selected in the step before
            state["last"] = torch.full_like(state["indices"], int(state["step"]) - 1, dtype=torch.int32)
        fresh = state["last"] >= int(state["step"]) - after
        if not fresh.all():
            for key in ("indices", "exp_avg", "exp_avg_sq", "last"):
                state[key] = state[key][fresh]

    def _step_dense(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """AdamW's step of parameters that have a gradient."""
        weights: list[Tensor] = []
        for parameter in parameters:
            state = self.state[parameter]
            precision = torch.promote_types(parameter.dtype, torch.float32)
            if not state:
                state["step"] = torch.tensor(0.0, device=parameter.device if self._fused else "cpu")
                state["exp_avg"] = torch.zeros_like(parameter, dtype=precision)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=precision)
                if parameter.dtype != precision:  # bfloat16 swallows small updates: step a float32 master
                    state["master"] = parameter.detach().to(precision)
            elif "master" in state and self._versions.get(parameter) != version(parameter):
                same = state["master"].to(parameter.dtype) == parameter  # else others have written to it: follow
                state["master"] = torch.where(same, state["master"], parameter.to(precision))
            weights.append(state.get("master", parameter))
        states = [self.state[p] for p in parameters]
        adamw(
            weights,
            [p.grad.to(w.dtype) for p, w in zip(parameters, weights, strict=True) if p.grad is not None],
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
        )
        for parameter, weight in zip(parameters, weights, strict=True):
            if weight is not parameter:
                parameter.copy_(weight)
                self._versions[parameter] = version(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; indices, moments and masters keep their own dtypes.

        Raises:
            ValueError: if the groups are another model's.
        """
        super().load_state_dict(state_dict)
        # torch casts every state tensor to the parameter's dtype, which would destroy indices and masters.
        saved = state_dict["state"]
        order = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(order, parameters, strict=True):
            for key, value in saved.get(index, {}).items():
                on_cpu = key == "step" and (self._is_lazy(parameter) or not self._fused)
                device = "cpu" if on_cpu else parameter.device
                self.state[parameter][key] = value.to(device=device, copy=True)

    def touched(self, layer: SparseGradLinear) -> Tensor:
        """Flat indices, int64 and ascending, of the entries that steps have moved and that still have a state."""
        state, device = self.state.get(layer.trained, {}), layer.trained.device
        if state and not layer.selects:
            return torch.arange(layer.trained.numel(), device=device)
        return state.get("indices", torch.empty(0, dtype=torch.int64, device=device))


def param_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group: SparseGrad weights, and all others.

    Biases, LayerNorm and everything else outside the SparseGrad weights are dense (D8: the released code forgot some).

    Args:
        model: after :func:`sparsegrad.sparsify`.
        weight_decay: for the dense group.

    Raises:
        ValueError: if the weight of a SparseGrad layer is frozen, or no longer the layer's own.
    """
    named = {name: m for name, m in model.named_modules() if isinstance(m, SparseGradLinear)}
    layers = list(named.values())
    if frozen := [name for name, layer in named.items() if not layer.trained.requires_grad]:
        raise ValueError(
            f"{len(frozen)} of {len(layers)} SparseGrad layers are frozen ({', '.join(frozen[:4])}) and would not be "
            "trained: set requires_grad of their weights, or leave them out of target_modules or layers_to_transform."
        )
    own = {n: isinstance(m.trained, SparseGradWeight) and m.trained.dim() == 2 for n, m in named.items()}
    if replaced := [name for name, is_own in own.items() if not is_own]:
        raise ValueError(_REPLACED.format(", ".join(replaced[:4])))
    sparse = {id(layer.trained) for layer in layers}
    dense = [p for p in model.parameters() if p.requires_grad and id(p) not in sparse]
    groups: list[dict[str, Any]] = [
        {"params": dense, "weight_decay": weight_decay},
        {"params": [layer.trained for layer in layers], "layers": layers},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for any model: SparseGrad weights count with the entries that are kept.

    Returns:
        The norm before clipping.

    Raises:
        ValueError: if max_norm is not above 0, or a gradient is not finite; the message names it, and none is changed.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}; it must be above 0.")
    layers = [m for m in model.modules() if isinstance(m, SparseGradLinear)]
    _select(layers)
    layers = [layer for layer in layers if layer.selects]
    sparse = {id(layer.trained) for layer in layers}
    kept = [pair[1] for pair in (layer.selected_gradient() for layer in layers) if pair is not None]
    dense = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in sparse]
    total = torch.nn.utils.get_total_norm(kept + dense)
    if not torch.isfinite(total):  # the only wait for the device; scaled by it, one NaN would be in every gradient
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        raise NonFiniteGradient(*(n for n, g in gradients.items() if not torch.isfinite(torch.linalg.vector_norm(g))))
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in dense:
        gradient.mul_(scale)
    for layer in layers:
        layer.scale_gradient(scale)
    return total


def _select(layers: Iterable[SparseGradLinear]) -> None:
    """Select every gradient that is to be selected; of what else there is, all at once, see that it is finite."""
    unsure: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        if layer.selects:
            layer.select()
        gradient = layer.trained.grad
        if isinstance(gradient, CompactGradient):
            if gradient.finite:
                continue
            gradient = gradient.entries
        if gradient is not None:
            unsure[layer.name or f"SparseGrad layer {number}"] = gradient
    if unsure and not torch.isfinite(torch.nn.utils.get_total_norm(unsure.values(), norm_type=float("inf"))):
        raise NonFiniteGradient(*(name for name, gradient in unsure.items() if not torch.isfinite(gradient).all()))
