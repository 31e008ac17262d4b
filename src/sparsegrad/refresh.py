"""New bases for truncated layers in the middle of training: a leading block goes stale as the weights move.

A side path is first added to its frozen weight: S in the new bases, (V' V^T) S (U' U^T)^T, would lose what lies outside
the new block. In a weight below float32 what rounding loses is kept in S, as far as the new block holds it.

Adam's state is ``reset``, or ``carry``, as SOAP (arXiv 2409.11321) does when it renews its eigenbases: the first moment
is a mean of gradients and is turned with the basis, m' = (V' V^T) m (U' U^T)^T; the second is a mean of squares, which
no rotation carries over, and is kept as it is, since both bases are ordered by the energy of the gradients. GaLore
(arXiv 2403.03507) keeps both unrotated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sparsegrad.basis import Basis
from sparsegrad.convert import sparsegrad_layers
from sparsegrad.core import CoreLinear
from sparsegrad.optim import SparseGradAdamW
from sparsegrad.truncated import TruncatedLinear

STATES = ("reset", "carry")


@torch.no_grad()
def refresh(
    model: nn.Module, bases: Mapping[str, Basis], optimizer: SparseGradAdamW | None = None, *, state: str = "reset"
) -> nn.Module:
    """Give truncated layers new bases; the function of the model does not change. Call it between steps.

    Args:
        model: sparsified with ``form="truncated"``.
        bases: one for each layer kind that is to change; at least as many rows as the layers have. Copied in place,
            so layers of a kind go on sharing theirs, and compiled or captured graphs stay valid.
        optimizer: the one that trains the model; None where none does.
        state: of the optimizer: ``reset`` (moments and step count start anew) or ``carry`` (see the module).

    Returns:
        The same model.

    Raises:
        ValueError: on an unknown word, a kind that no truncated layer has, a basis of other shapes or too few rows, a
            gradient that no step has taken, or ``carry`` where a top k is selected inside the core. Nothing has
            changed then.
    """
    if state not in STATES:
        raise ValueError(f"state={state!r}; allowed: {', '.join(STATES)}.")
    cores = {name: m for name, m in sparsegrad_layers(model).items() if isinstance(m, CoreLinear)}
    kinds = {layer.kind for layer in cores.values()}
    unknown = [kind for kind in bases if kind not in kinds]
    if unknown or not cores:
        found = ", ".join(sorted(filter(None, kinds))) or "none"
        raise ValueError(
            f"bases for layer kinds {list(bases)}; kinds of this model's truncated layers: {found}. Layers of "
            "other forms keep their bases."
        )
    layers = [_refreshable(name, m, bases[m.kind]) for name, m in cores.items() if m.kind in bases]
    if state == "carry" and any(layer.selects for layer in layers):
        raise ValueError("state='carry' turns a dense core; with keep the moments are lazy: use state='reset'.")
    turned: dict[int, tuple[Basis, Basis]] = {}
    for layer in layers:
        old, (_, c) = layer.basis, layer.ranks
        if id(old) not in turned:
            basis = bases[layer.kind]
            turned[id(old)] = (old, Basis(basis.U[:c].to(old.U), basis.V[: len(old.V)].to(old.V)))
        basis = turned[id(old)][1]
        layer.rebase(basis)
        if optimizer is not None:
            _renew(optimizer, layer, basis, state)
    for old, basis in turned.values():
        old.U.copy_(basis.U)
        old.V.copy_(basis.V)
    return model


def _refreshable(name: str, layer: CoreLinear, basis: Basis) -> TruncatedLinear:
    """The layer, if it can be given this basis."""
    old, (r, c) = layer.basis, (len(layer.basis.V), layer.ranks[1])
    if not isinstance(layer, TruncatedLinear):
        raise ValueError(f"{name} is quantised: its weight can't take the core in, so its basis can't be changed.")
    if (basis.out_features, basis.in_features) != (old.out_features, old.in_features):
        raise ValueError(
            f"{name}: the new basis is for weights of shape {(basis.out_features, basis.in_features)}, "
            f"this one has {(old.out_features, old.in_features)}."
        )
    if basis.V.shape[0] < r or basis.U.shape[0] < c:
        raise ValueError(f"{name}: the new basis has {basis.V.shape[0]} and {basis.U.shape[0]} rows, not {r} and {c}.")
    try:
        basis.refuse_skewed()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if layer.core.grad is not None:
        raise ValueError(f"{name} holds a gradient in the old basis: refresh after optimizer.step() and zero_grad().")
    return layer


def _renew(optimizer: SparseGradAdamW, layer: TruncatedLinear, basis: Basis, state: str) -> None:
    if state == "reset":
        optimizer.forget(layer)
    elif optimizer.state.get(layer.core):
        old, moments = layer.basis, optimizer.state[layer.core]
        m = moments["exp_avg"]
        turned = m @ (old.U @ basis.U.T).to(m)
        m.copy_((basis.V @ old.V.T).to(m) @ turned if old.rotates_output else turned)
