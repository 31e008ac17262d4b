"""Checkpoints of a sparsified model that a plain one would take for its own, and compute something else.

W_rot of the rotated form, W without the core beside it, and a Conv1D's weight as a matrix ``(out_features,
in_features)`` would lie under the plain weight's name. In a state dictionary they lie there with a leading dimension
of 1; where layers hold nothing of that name (a quantised linear, experts), one number does. Whoever loads that into a
plain model (``load_state_dict``, strict or not, transformers' ``from_pretrained``) ends with its own error, a size
mismatch of this name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sparsegrad.linear import SparseGradLinear


def mark(layer: SparseGradLinear, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """After a layer has put its tensors into a state dictionary."""
    name = f"{prefix}weight"
    if not (layer.plain_state and (layer.origin is None or not layer.origin.transposed)):
        state[name] = state[name][None] if name in state else torch.zeros(1)


def unmark(
    layer: SparseGradLinear,
    state: dict[str, Tensor],
    prefix: str,
    _metadata: object,
    _strict: object,
    *messages: list[str],
) -> None:
    """Before a layer takes its tensors from one."""
    name = f"{prefix}weight"
    weight, errors = state.get(name), messages[-1]
    if weight is None:
        return
    if weight.dim() == 1:
        del state[name]
    elif weight.dim() == 3:
        state[name] = weight[0]
    elif layer.trained is layer.stored and not layer.plain_state:
        errors.append(
            f"{name} of shape {tuple(weight.shape)} is a plain weight, and this layer keeps a rotated one: load it "
            "into the plain model, and sparsify that."
        )


def mark_place(_layers: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """After layers that stand in a parameter's place have put their tensors into a state dictionary."""
    state[prefix.removesuffix(".")] = torch.zeros(1)


def unmark_place(
    _layers: nn.Module,
    _state: dict[str, Tensor],
    prefix: str,
    _metadata: object,
    _strict: object,
    _missing: list[str],
    unexpected: list[str],
    _errors: list[str],
) -> None:
    """Before they take them from one: the module around them expects nothing of that name."""
    if (name := prefix.removesuffix(".")) in unexpected:
        unexpected.remove(name)
