"""Selection of several layers at once: few operations a step, whatever the number of layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sparsegrad.compact import CompactGradient
from sparsegrad.linear import SparseGradLinear
from sparsegrad.select import NonFiniteGradient, selected

TOGETHER = 2**25  # entries that are treated at once: twelve matrices of 3072 x 768 are, and 128 MB in float32


def alike(layers: Iterable[SparseGradLinear]) -> Iterator[list[SparseGradLinear]]:
    """Groups of layers that can be stepped together, in their order, of :data:`TOGETHER` entries or one layer."""
    groups: dict[tuple[object, ...], list[SparseGradLinear]] = {}
    for layer in layers:
        groups.setdefault(layer.likeness, []).append(layer)
    for group in groups.values():
        size = max(1, TOGETHER // group[0].trained.numel())
        yield from (group[start : start + size] for start in range(0, len(group), size))


@torch.no_grad()
def select_together(layers: Sequence[SparseGradLinear]) -> None:
    """Select every gradient that is to be selected; see that those, and all others of these layers, are finite.

    Raises:
        NonFiniteGradient: if one is not.
    """
    groups = list(alike(layer for layer in layers if layer.selects and _is_dense(layer)))
    fine = [_select(group) for group in groups]
    done = {layer for group in groups for layer in group}
    unsure = {layer: g for layer in layers if layer not in done and (g := _changeable(layer)) is not None}
    if unsure:
        norm = torch.nn.utils.get_total_norm(unsure.values(), norm_type=float("inf"))
        fine.append(torch.isfinite(norm)[None])
    if not fine or torch.cat(fine).all():  # the one wait for the device
        return
    good = dict(zip((layer for group in groups for layer in group), torch.cat(fine).tolist(), strict=False))
    good |= {layer: bool(torch.isfinite(g).all()) for layer, g in unsure.items()}
    names = {layer: layer.name or f"SparseGrad layer {number}" for number, layer in enumerate(layers)}
    raise NonFiniteGradient(*(name for layer, name in names.items() if not good.get(layer, True)))


def _changeable(layer: SparseGradLinear) -> Tensor | None:
    """What of a layer's gradient nothing has looked at since it came, or since others may have changed it."""
    gradient = layer.trained.grad
    if isinstance(gradient, CompactGradient):
        return None if gradient.finite else gradient.entries
    return gradient


def _is_dense(layer: SparseGradLinear) -> bool:
    return layer.trained.grad is not None and not isinstance(layer.trained.grad, CompactGradient)


def _select(group: Sequence[SparseGradLinear]) -> Tensor:
    """Give layers that are alike their selected gradients; whether each is finite, bool ``(layers,)``."""
    dense = []
    for layer in group:
        dense.append(layer.trained.grad)
        layer.trained.grad = None
    first = group[0]
    G = first.rotated_gradients(group, dense)
    places, values, finite = selected(G, first.k, first.rule)
    for layer, own, entries in zip(group, places.unbind(), values.unbind(), strict=True):
        layer.trained.grad = CompactGradient(own, entries, layer.trained)
    return finite
