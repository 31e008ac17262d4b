"""New bases in the middle of training: the leading block of bases from the start goes stale as the weights move.

Moments of the gradients are collected at the present weights, on the batches that are trained next, so that nothing but
the step decides them: a run that was killed and goes on refreshes as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsegrad import GradientMoments, hosvd, refresh, sparsegrad_layers


@dataclass(frozen=True)
class RefreshOptions:
    """When and how the bases of truncated layers are renewed; the values stand in ``conf/method``.

    Attributes:
        steps: optimizer steps between refreshes.
        batches: forward and backward passes whose gradients give the new bases.
        state: of the optimizer, ``reset`` or ``carry`` (:func:`sparsegrad.refresh`).
    """

    steps: int
    batches: int
    state: str = "carry"

    def due(self, step: int) -> bool:
        """Whether the bases are renewed before the step with this number, from 0; the first ones are new."""
        return step > 0 and step % self.steps == 0


def refresh_options(method: Mapping[str, Any]) -> RefreshOptions | None:
    """What a method's file asks for; None without a key ``refresh``."""
    given = method.get("refresh")
    return None if given is None else RefreshOptions(**given)


class GradientCollector:
    """Moments of the weight gradients of SparseGrad layers, from the backward passes inside a ``with`` block.

    A gradient g^T x is formed from a layer's input ``(N, in_features)`` and output gradient ``(N, out_features)``: a
    truncated layer has none of its own. Where a batch is one backward pass of one process, each is added to the moments
    and freed at once. Else the dense gradients of a batch are held and summed until :meth:`end_batch`, those of all
    layers at once, so that the moments do not depend on how a batch is cut.

    Args:
        model: its SparseGrad layers are watched.
        whole_batches: every backward pass is a batch of its own.
    """

    def __init__(self, model: nn.Module, *, whole_batches: bool) -> None:
        self.moments: dict[str, GradientMoments] = {}
        self._layers, self._whole = sparsegrad_layers(model), whole_batches
        self._sums: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> GradientCollector:
        self._hooks = [layer.register_forward_hook(self._watch(name)) for name, layer in self._layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def end_batch(self) -> None:
        """Add what is held, summed over all processes, to the moments."""
        for name in list(self._sums):
            G = self._sums.pop(name)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(G)
            self._add(name, G)

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            x = given[0].detach()
            output.register_hook(lambda g: self._take(name, g, x))

        return keep

    def _take(self, name: str, g: Tensor, x: Tensor) -> None:
        precision = torch.promote_types(g.dtype, torch.float32)
        rows, inputs = (t.reshape(-1, t.shape[-1]).to(precision) for t in (g, x))
        G = rows.T @ inputs
        if self._whole:
            self._add(name, G)
        else:
            self._sums[name] = self._sums[name] + G if name in self._sums else G

    def _add(self, name: str, G: Tensor) -> None:
        kind = self._layers[name].kind
        if kind not in self.moments:
            self.moments[kind] = GradientMoments(*G.shape, device=G.device)
        self.moments[kind].update(G)


def renew(model: nn.Module, collector: GradientCollector, optimizer: torch.optim.Optimizer, state: str) -> None:
    """Give the truncated layers the HOSVD bases of what was collected."""
    bases = {kind: hosvd(moments) for kind, moments in collector.moments.items()}
    refresh(model, bases, optimizer, state=state)
