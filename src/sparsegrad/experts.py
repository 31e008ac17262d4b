"""Experts whose weights are one 3-D parameter ``(experts, out_features, in_features)``, as transformers 5 keeps them.

The parameter is replaced by a list of layers. transformers' eager experts read ``F.linear(x, self.gate_up_proj[i])``;
what the list gives for i stands in for the matrix there, and calls the layer. The batched implementations multiply the
whole parameter at once and have none, so they are left until the parameter is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsegrad.linear import SparseGradLinear
from sparsegrad.unmerged import mark_place, unmark_place

EAGER = "eager"


class ExpertWeight:
    """One expert's matrix: ``F.linear(x, weight)`` calls its layer, and nothing else is defined."""

    def __init__(self, layer: SparseGradLinear) -> None:
        self.layer = layer

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Tensor:
        if func is not F.linear or len(args) != 2 or kwargs or not isinstance(args[1], cls):
            raise TypeError(
                f"{getattr(func, '__name__', func)} reads the weights of experts; SparseGrad replaces those of "
                "F.linear(x, weight) alone, as transformers' eager experts call it: leave these experts out of "
                "target_modules."
            )
        return args[1].layer(args[0])


class ExpertList(nn.Module):
    """The layers of all experts, in the place of their parameter.

    Args:
        layers: one an expert, in order.
        experts: the module whose parameter is replaced.
        name: of the parameter in it.
    """

    def __init__(self, layers: Sequence[SparseGradLinear], experts: nn.Module, name: str) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)
        self.name = name
        self.order = list(experts._parameters)
        self.implementation = _implementation(experts)
        self.register_state_dict_post_hook(mark_place)
        self.register_load_state_dict_pre_hook(unmark_place)

    def __getitem__(self, index: int | Tensor) -> ExpertWeight:
        """The weight of an expert: a number, or a tensor that holds one."""
        return ExpertWeight(self.layers[int(index)])

    @property
    def layers(self) -> list[SparseGradLinear]:
        """In the order of the experts."""
        return cast(list[SparseGradLinear], list(self._modules.values()))

    def put_in(self, experts: nn.Module) -> None:
        """Take the parameter's place."""
        delattr(experts, self.name)
        setattr(experts, self.name, self)
        _implement(experts, EAGER)

    def put_back(self, experts: nn.Module) -> None:
        """Give the place to a parameter of the same function."""
        weights = [layer.to_linear().weight for layer in self.layers]
        delattr(experts, self.name)
        trained = any(weight.requires_grad for weight in weights)
        setattr(experts, self.name, nn.Parameter(torch.stack([w.detach() for w in weights]), requires_grad=trained))
        for name in (name for name in self.order if name in experts._parameters):
            experts._parameters[name] = experts._parameters.pop(name)  # in the order that they had
        _implement(experts, self.implementation)


def refuse_transposed(experts: nn.Module) -> None:
    """Raise ValueError for experts whose matrices transformers keeps transposed."""
    if getattr(experts, "is_transposed", False):
        raise ValueError(
            f"{type(experts).__name__} keeps its experts' weights as (in_features, out_features), which is not "
            "supported: leave them out of target_modules."
        )


def put_in(model: nn.Module, lists: Mapping[tuple[nn.Module, str], Sequence[SparseGradLinear]]) -> None:
    """Replace parameters, given by module and name, by the layers of their experts."""
    if lists:
        _convert(model, False)
    # All are made before one is put in: they remember the experts' implementation, which blocks share.
    made = [(experts, ExpertList(layers, experts, name)) for (experts, name), layers in lists.items()]
    for experts, layers in made:
        layers.put_in(experts)


def put_back(model: nn.Module) -> None:
    """Replace every list in a model by a 3-D parameter of the same function."""
    _convert(model, True)
    for experts in list(model.modules()):
        for child in list(experts.children()):
            if isinstance(child, ExpertList):
                child.put_back(experts)


def _convert(model: nn.Module, on: bool) -> None:
    """Whether transformers writes checkpoints in the names of older ones, where it would cut layers' tensors apart."""
    for module in model.modules():
        own = vars(module)
        if on and "_plain_conversions" in own:
            own["_weight_conversions"] = own.pop("_plain_conversions")
        elif not on and hasattr(module, "save_pretrained"):
            own["_plain_conversions"], own["_weight_conversions"] = own.get("_weight_conversions"), []


def _implementation(experts: nn.Module) -> str | None:
    """How transformers computes them; None where it does not choose."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None)


def _implement(experts: nn.Module, implementation: str | None) -> None:
    if _implementation(experts) is not None:
        cast(Any, experts.config)._experts_implementation = implementation
