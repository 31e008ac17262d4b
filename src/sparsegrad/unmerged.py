"""What SparseGrad layers add to a state dictionary: marks that keep plain models from it, and which entries moved.

A plain model would take some of a sparsified one's tensors for its own, and compute something else.
W_rot of the rotated form, W without the core beside it, and a Conv1D's weight as a matrix ``(out_features,
in_features)`` would lie under the plain weight's name. In a state dictionary they lie there with a leading dimension
of 1; where layers hold nothing of that name (a quantised linear, experts), one number does. Whoever loads that into a
plain model (``load_state_dict``, strict or not, transformers' ``from_pretrained``) ends with its own error, a size
mismatch of this name.

``moved`` holds what an adapter of a run that went on from a checkpoint must know, in bytes: fingerprints of the weight
that training began with and of the one that is saved (zero where that is not known), and a bit for every entry that
moved between. Where the weight that is loaded is another one (an average of checkpoints), any entry may have moved.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsegrad.fingerprint import fingerprint

if TYPE_CHECKING:
    from sparsegrad.linear import SparseGradLinear


def mark(layer: SparseGradLinear, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """After a layer has put its tensors into a state dictionary."""
    name = f"{prefix}weight"
    if not (layer.plain_state and (layer.origin is None or not layer.origin.transposed)):
        state[name] = state[name][None] if name in state else torch.zeros(1)
    layer.follow()
    moved = layer.moved if layer.start and not layer.trained.is_meta else None
    bits = torch.zeros(-(-prod(layer.rotated_shape) // 8) * 8, dtype=torch.uint8, device=layer.trained.device)
    ends = bytes(16) if moved is None else _ends(layer)
    if moved is not None:
        bits[moved] = 1
    packed = (bits.view(-1, 8) << _eight(bits)).sum(1, dtype=torch.uint8)
    state[f"{prefix}moved"] = torch.cat((torch.tensor(list(ends), dtype=torch.uint8, device=bits.device), packed))


def unmark(
    layer: SparseGradLinear,
    state: dict[str, Tensor],
    prefix: str,
    _metadata: object,
    _strict: object,
    *messages: list[str],
) -> None:
    """Before a layer takes its tensors from one."""
    layer.loaded = state.pop(f"{prefix}moved", None)
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


def take_moved(layer: SparseGradLinear, _: object) -> None:
    """After it has."""
    loaded, layer.loaded = layer.loaded, None
    if loaded is not None and layer.start:
        layer.follow()
        if bytes(loaded[:16].tolist()) == _ends(layer):
            packed = loaded[16:, None].to(layer.trained.device)
            layer.moved = (packed >> _eight(packed) & 1).flatten().nonzero().flatten()


def _eight(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def _ends(layer: SparseGradLinear) -> bytes:
    """Of the weight that training began with, and of what it is now."""
    return bytes.fromhex(layer.start + fingerprint(layer.stored))


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
