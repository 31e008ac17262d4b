"""What an optimizer of a SparseGrad model is given, and the norm of its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.compact import CompactGradient
from sparsegrad.grouped import select_together
from sparsegrad.linear import REPLACED, SparseGradLinear
from sparsegrad.model import SparseGradModel
from sparsegrad.select import NonFiniteGradient


def param_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group: SparseGrad weights, and all others.

    Biases, LayerNorm and everything else outside the SparseGrad weights are dense (D8: the released code forgot some).

    Args:
        model: after :func:`sparsegrad.sparsify`, or a :class:`sparsegrad.SparseGradModel`: of that, what its
            configuration trains (:meth:`~sparsegrad.SparseGradModel.thaw`).
        weight_decay: for the dense group.

    Raises:
        ValueError: as ``thaw``, or if the weight of a SparseGrad layer is frozen, or no longer the layer's own.
    """
    if isinstance(model, SparseGradModel):
        model.thaw()
    named = {name: m for name, m in model.named_modules() if isinstance(m, SparseGradLinear)}
    layers = list(named.values())
    if frozen := [name for name, layer in named.items() if not layer.trained.requires_grad]:
        raise ValueError(
            f"{len(frozen)} of {len(layers)} SparseGrad layers are frozen ({', '.join(frozen[:4])}) and would not be "
            "trained: set requires_grad of their weights, or leave them out of target_modules or layers_to_transform."
        )
    if replaced := [name for name, layer in named.items() if not layer.owns(layer.trained)]:
        raise ValueError(REPLACED.format(", ".join(replaced[:4])))
    sparse = {id(layer.trained) for layer in layers}
    dense = [p for p in model.parameters() if p.requires_grad and id(p) not in sparse]
    groups: list[dict[str, Any]] = [
        {"params": dense, "weight_decay": weight_decay},
        {"params": [layer.trained for layer in layers], "layers": layers},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, *, error_if_nonfinite: bool = True) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for any model: SparseGrad weights count with the entries that are kept.

    Args:
        model: after its backward passes.
        max_norm: of all gradients together, from now on.
        error_if_nonfinite: False for a ``GradScaler``, which has noted what overflowed and skips the step.

    Returns:
        The norm before clipping.

    Raises:
        ValueError: if max_norm is not above 0, or a gradient is not finite; the message names it, and none is changed.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}; it must be above 0.")
    layers = [m for m in model.modules() if isinstance(m, SparseGradLinear)]
    select_together(layers, refuse=error_if_nonfinite)
    compact = [p.grad for p in model.parameters() if isinstance(p.grad, CompactGradient)]
    dense = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p.grad, CompactGradient)]
    kept = [gradient.entries for gradient in compact]
    total = torch.nn.utils.get_total_norm(kept + dense)
    if not torch.isfinite(total):  # scaled by it, one NaN would be in every gradient
        if not error_if_nonfinite:
            return total
        own = {layer.trained: layer.name for layer in layers}
        gradients = {own.get(p) or name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        raise NonFiniteGradient(*(n for n, g in gradients.items() if not torch.isfinite(torch.linalg.vector_norm(g))))
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in dense:
        gradient.mul_(scale)
    for gradient in compact:
        gradient.entries = gradient.entries * scale
    return total
