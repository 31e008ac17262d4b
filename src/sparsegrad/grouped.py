"""Several layers at once: few operations a step, whatever the number of layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sparsegrad.compact import CompactGradient
from sparsegrad.linear import SparseGradLinear
from sparsegrad.select import NonFiniteGradient, selected

TOGETHER = 2**25  # entries that are treated at once: twelve matrices of 3072 x 768 are, and 128 MB in float32


@dataclass
class Selected:
    """The kept entries of layers that are alike.

    Attributes:
        layers: in the order of the rows.
        places: flat indices in rotated coordinates, int64 ``(layers, k)``, ascending in each row.
        values: ``(layers, k)``.
        finite: whether a layer's gradient is, bool ``(layers,)``.
    """

    layers: list[SparseGradLinear]
    places: Tensor
    values: Tensor
    finite: Tensor


def alike(layers: Iterable[SparseGradLinear]) -> Iterator[list[SparseGradLinear]]:
    """Groups of layers that can be stepped together, in their order, of :data:`TOGETHER` entries or one layer."""
    groups: dict[tuple[object, ...], list[SparseGradLinear]] = {}
    for layer in layers:
        groups.setdefault(layer.likeness, []).append(layer)
    for group in groups.values():
        size = max(1, TOGETHER // group[0].trained.numel())
        yield from (group[start : start + size] for start in range(0, len(group), size))


def take_selected(layers: Sequence[SparseGradLinear]) -> list[Selected]:
    """Take the gradients of selecting layers, select those that are not yet selected, and leave none behind."""
    gradients = {layer: layer.trained.grad for layer in layers if layer.trained.grad is not None}
    for layer in gradients:
        layer.zero_gradient()
    found = []
    for group in alike(layer for layer, g in gradients.items() if not isinstance(g, CompactGradient)):
        first = group[0]
        G = first.rotated_gradients(group, [gradients.pop(layer) for layer in group])
        found.append(Selected(group, *selected(G, first.k, first.rule)))
        del G
    for group in alike(layer for layer, g in gradients.items() if isinstance(g, CompactGradient) and len(g.places)):
        own = [cast(CompactGradient, gradients[layer]) for layer in group]
        values = torch.stack([g.entries for g in own])
        sure = all(g.finite for g in own)  # since they were selected, nothing may have changed them
        finite = values.new_ones(len(own), dtype=torch.bool) if sure else torch.isfinite(values).all(1)
        found.append(Selected(group, torch.stack([g.places for g in own]), values, finite))
    return found


@torch.no_grad()
def select_together(layers: Sequence[SparseGradLinear], refuse: bool = True) -> None:
    """Leave selected gradients in place of dense ones.

    Raises:
        NonFiniteGradient: if one is not finite, and that is to be refused.
    """
    dense = [layer for layer in layers if layer.selects and not isinstance(layer.trained.grad, CompactGradient)]
    found = take_selected(dense)
    if refuse:
        refuse_non_finite([(one.layers, one.finite) for one in found])
    for one in found:
        fine = [True] * len(one.layers) if refuse else one.finite.tolist()
        for layer, places, values, finite in zip(
            one.layers, one.places.unbind(), one.values.unbind(), fine, strict=True
        ):
            gradient = CompactGradient(places, values, layer.trained)
            layer.trained.grad = gradient if finite else gradient.spoil()


def all_finite(flags: Sequence[tuple[Sequence[SparseGradLinear], Tensor]]) -> Tensor:
    """Whether all of them are, bool scalar, where the first one is."""
    device = flags[0][1].device
    return torch.cat([finite.to(device) for _, finite in flags]).all()


def refuse_non_finite(flags: Sequence[tuple[Sequence[SparseGradLinear], Tensor]]) -> None:
    """Wait for the device once, and see that all is finite.

    Args:
        flags: layers, and of each, or of all of them together, whether it is, bool ``(layers,)`` or ``(1,)``.

    Raises:
        NonFiniteGradient: if one is not; it names the layers that may be meant.
    """
    if flags and not all_finite(flags):
        one_each = [(layers, finite.expand(len(layers)).tolist()) for layers, finite in flags]
        bad = [layer for layers, fine in one_each for layer, good in zip(layers, fine, strict=True) if not good]
        raise NonFiniteGradient(*(layer.name or "a SparseGrad layer" for layer in bad))
