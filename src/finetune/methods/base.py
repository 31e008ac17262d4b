"""What a method is, and what all methods share: the matrices they target and the parameters around them.

A new method is one module with one subclass of :class:`Method`, and one file in ``conf/method`` whose ``base`` names
the module. The subclass writes what differs from full fine-tuning: at least :meth:`Method.from_config` and
:meth:`Method.prepare`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn
from torch.optim import AdamW, Optimizer

from finetune.methods.costs import MatrixMemory, Operations, Shape
from sparsegrad import Basis, Target, entries_for_density, find_targets
from sparsegrad.select import check_k

SCOPES = ("all", "mlp", "targets")


@dataclass(frozen=True)
class Targets:
    """The matrices that a method treats in its own way, and which parameters train around them.

    Attributes:
        target_modules: layer kind to regular expression (see :func:`sparsegrad.find_targets`).
        layers_to_transform: block indices, or None for all.
        scope: ``all`` trains everything else too, as the paper does for GLUE (D-section 2: LoRA leaves only the wrapped
            weights frozen); ``mlp`` trains the target layers and the classification head alone; ``targets`` trains the
            target layers and nothing else, as the paper does for LLaMa-2.
        frozen: regular expressions searched in parameter names; what they find is not trained.
        also_train: layer kind to regular expression, as ``target_modules``: layers of the same blocks that train as a
            whole whatever the method (D17, D19: gate_proj).
    """

    target_modules: Mapping[str, str]
    layers_to_transform: Sequence[int] | None = None
    scope: str = "all"
    frozen: tuple[str, ...] = ()
    also_train: Mapping[str, str] = field(default_factory=dict)

    def find(self, model: nn.Module) -> list[Target]:
        """The target layers of a model; ValueError if a pattern matches nothing."""
        return find_targets(model, self.target_modules, self.layers_to_transform)

    def set_trainable(self, model: nn.Module) -> list[Target]:
        """Set ``requires_grad`` of a plain model by scope and frozen patterns; returns the targets.

        Raises:
            ValueError: on an unknown scope, or a frozen pattern that finds nothing.
        """
        if self.scope not in SCOPES:
            raise ValueError(f"protocol.train={self.scope!r}; allowed: {', '.join(SCOPES)}.")
        targets = self.find(model)
        prefix = f"{model.base_model_prefix}."
        others = find_targets(model, self.also_train, self.layers_to_transform) if self.also_train else []
        inside = tuple(f"{target.name}." for target in (*targets, *others))
        for name, parameter in model.named_parameters():
            head = self.scope == "mlp" and not name.startswith(prefix)
            parameter.requires_grad_(self.scope == "all" or head or name.startswith(inside))
        for pattern in self.frozen:
            found = [p for n, p in model.named_parameters() if re.search(pattern, n)]
            if not found:
                raise ValueError(f"protocol.frozen has {pattern!r}, which finds no parameter of this model.")
            for parameter in found:
                parameter.requires_grad_(False)
        return targets


@dataclass(frozen=True)
class Configuration:
    """What a method is made from.

    Attributes:
        method, model, protocol: the configuration groups.
        targets: of :func:`finetune.methods.build_targets`.
        bases: by layer kind, for methods that need them.
        one_backward_a_step: no accumulation and one process, so that a gradient may be selected in the backward pass.
        device: type of the one that trains.
        seed: of the run, for what a method draws.
    """

    method: Mapping[str, Any]
    model: Mapping[str, Any]
    protocol: Mapping[str, Any]
    targets: Targets
    bases: Mapping[str, Basis] | None = None
    one_backward_a_step: bool = False
    device: str = "cuda"
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """How the weights of the target matrices move: three verbs, and numbers for tables and plan.

    What stands here is full fine-tuning's.

    Attributes:
        needs_bases: whether it rotates gradients, so that gradients and bases are collected before it runs.
        targets: the matrices, and what trains around them.
    """

    needs_bases: ClassVar[bool] = False

    targets: Targets

    @classmethod
    def from_config(cls, config: Configuration) -> Self:
        """The method that the configuration groups describe.

        Raises:
            ValueError: on an option that the method refuses.
        """
        return cls(config.targets)

    @property
    def selects_in_backward(self) -> bool:
        """Whether entries of a gradient are selected in the backward pass, so that no dense gradient waits."""
        return False

    def prepare(self, model: nn.Module) -> nn.Module:
        """Make the model trainable by this method, in place; its function does not change."""
        self.targets.set_trainable(model)
        return model

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        """One optimizer that holds every trainable parameter in exactly one group."""
        return AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay, fused=True)

    def merge(self, model: nn.Module) -> nn.Module:
        """A plain model of the same function."""
        return model

    def entries(self, shape: Shape) -> int:
        """Trained numbers of one target matrix ``(out_features, in_features)``: what the tables call its trainables."""
        return shape[0] * shape[1]

    def operations(self, shape: Shape) -> Operations:
        """Operations of one target matrix beyond its product and its input's gradient: the weight's gradient."""
        return Operations(2.0 * shape[0] * shape[1])

    def memory(self, shape: Shape, touched: float = 0.0) -> MatrixMemory:
        """Bytes of one target matrix while it trains; AdamW's two float32 moments beside a float32 gradient.

        Args:
            touched: share of the matrix that has been selected so far, for optimizers that hold state of that alone.
        """
        return MatrixMemory(4 * self.entries(shape), 8 * self.entries(shape))

    def backward_bytes(self, shape: Shape, positions: int, width: int) -> int:
        """Most bytes that a matrix's backward pass holds beside what autograd saved, see :mod:`finetune.methods.costs`.

        Args:
            positions: rows of its input.
            width: bytes of an activation.
        """
        return positions * width * (shape[0] + shape[1])

    def evaluation_bytes(self, shape: Shape, positions: int, width: int) -> int:
        """Most bytes of activations in a forward pass without gradients; arguments as of :meth:`backward_bytes`."""
        return positions * width * (2 * max(shape) + 3 * min(shape))


def count_parameters(model: nn.Module, method: Method) -> dict[str, int | float]:
    """Counts for the tables; a target matrix counts with the numbers that its method trains.

    Args:
        model: plain; its ``requires_grad`` flags are set as the method will have them.

    Returns:
        ``total`` (the plain model), ``trainable``, ``trainable_per_layer`` (mean over target matrices),
        ``wrapped_layers``.
    """
    targets = method.targets.set_trainable(model)
    entries = [method.entries(target.shape) for target in targets]
    whole = sum(target.weight.numel() for target in targets)
    return {
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad) - whole + sum(entries),
        "trainable_per_layer": sum(entries) / len(entries),
        "wrapped_layers": len(targets),
    }


def kept_entries(k: int | None, density: float | None, shape: tuple[int, int]) -> int:
    """Entries kept of a matrix: a density wins over the model's k.

    Raises:
        ValueError: if neither is given, or what is given is out of range.
    """
    if density is not None:
        return entries_for_density(density, shape)
    if k is None:
        raise ValueError("set protocol.density (a share of the entries) or model.k (a number of entries).")
    return check_k(k, shape)
