"""What stood in a layer's place, so that ``merge`` gives back a module of the same type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Origin:
    """A module's type and attributes, without what it computes with.

    Attributes:
        type: of the module: a subclass of ``nn.Linear``, or transformers' ``Conv1D``.
        attributes: its plain ones, as ``in_features``.
        transposed: its weight is ``(in_features, out_features)``.
    """

    type: type[nn.Module]
    attributes: dict[str, Any]
    transposed: bool

    def restored(self, linear: nn.Linear) -> nn.Module:
        """A module as the one that stood here, with the function of a linear layer, whose parameters it takes."""
        module = self.type.__new__(self.type)
        nn.Module.__init__(module)
        vars(module).update(self.attributes)
        weight = linear.weight.T.contiguous() if self.transposed else linear.weight
        module.register_parameter("weight", nn.Parameter(weight.detach(), requires_grad=linear.weight.requires_grad))
        module.register_parameter("bias", linear.bias)
        return module


def origin_of(module: nn.Module, transposed: bool) -> Origin:
    """Of a module that is about to be replaced.

    Raises:
        ValueError: if it computes with more than a weight and a bias.
    """
    held = [name for name, _ in (*module.named_parameters(), *module.named_buffers(), *module.named_children())]
    if own := sorted(set(held) - {"weight", "bias"}):
        raise ValueError(
            f"{type(module).__name__} computes with {', '.join(own[:4])} besides its weight and bias, which SparseGrad "
            "would leave out: leave it out of target_modules."
        )
    attributes = {
        name: value for name, value in vars(module).items() if not name.startswith("_") and not callable(value)
    }
    return Origin(type(module), attributes, transposed)
