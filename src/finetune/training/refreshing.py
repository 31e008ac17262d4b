"""New bases in the middle of training: the leading block of bases from the start goes stale as the weights move.

Moments of the gradients are collected at the present weights, on the batches that are trained next, so that nothing but
the step decides them: a run that was killed and goes on refreshes as one that was not.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsegrad import GradientMoments, hosvd, refresh, sparsegrad_layers
from sparsegrad.collect import whole_gradient


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

    Where a batch is one backward pass of one process, each is added to the moments and freed at once. Else the dense
    gradients of a batch are held and summed until :meth:`end_batch`, those of all layers at once, so that the moments
    do not depend on how a batch is cut.

    Args:
        model: its SparseGrad layers are watched.
        whole_batches: every backward pass is a batch of its own.
    """

    def __init__(self, model: nn.Module, *, whole_batches: bool) -> None:
        self.moments: dict[str, GradientMoments] = {}
        self._model, self._whole = model, whole_batches
        self._gradients: dict[Tensor, str] = {}
        self._watched = ExitStack()

    def __enter__(self) -> GradientCollector:
        for layer in sparsegrad_layers(self._model).values():
            weight = self._watched.enter_context(whole_gradient(layer))
            self._gradients[weight] = layer.kind
            if self._whole:
                weight.register_post_accumulate_grad_hook(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        self._watched.close()

    def end_batch(self) -> None:
        """Add what is held, summed over all processes, to the moments."""
        for weight in self._gradients:
            if weight.grad is not None:
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(weight.grad)
                self._add(weight)

    def _add(self, weight: Tensor) -> None:
        G, kind = weight.grad, self._gradients[weight]
        assert G is not None  # a backward pass has ended
        if kind not in self.moments:
            self.moments[kind] = GradientMoments(*G.shape, device=G.device)
        self.moments[kind].update(G)
        weight.grad = None


def renew(model: nn.Module, collector: GradientCollector, optimizer: torch.optim.Optimizer, state: str) -> None:
    """Give the truncated layers the HOSVD bases of what was collected."""
    bases = {kind: hosvd(moments) for kind, moments in collector.moments.items()}
    refresh(model, bases, optimizer, state=state)
