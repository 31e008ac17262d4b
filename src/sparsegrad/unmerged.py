"""Checkpoints of a sparsified model that a plain one would take for its own, and compute something else.

W_rot of the rotated form, and W without the core beside it, would lie under the plain weight's name. In a state
dictionary they lie there with a leading dimension of 1, and a quantised linear's place holds an empty tensor: whoever
loads that into a plain model (``load_state_dict``, strict or not, transformers' ``from_pretrained``) ends with its own
error, a size mismatch of this name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from sparsegrad.linear import SparseGradLinear


def mark(layer: SparseGradLinear, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """After a layer has put its tensors into a state dictionary."""
    name = f"{prefix}weight"
    if not layer.plain_state:
        state[name] = state[name][None] if name in state else layer.trained.new_empty(0)


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
    if not weight.numel():
        del state[name]
    elif weight.dim() == 3:
        state[name] = weight[0]
    elif layer.trained is layer.stored and not layer.plain_state:
        errors.append(
            f"{name} of shape {tuple(weight.shape)} is a plain weight, and this layer keeps a rotated one: load it "
            "into the plain model, and sparsify that."
        )
