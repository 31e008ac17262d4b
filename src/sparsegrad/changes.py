"""What an adapter holds of one layer's weight: values, exact, or differences from the base, rounded and the largest.

Values are read in rotated coordinates where steps have moved them, and need nothing else. With more steps that is more
of the matrix. Differences need the base's weight; an entry takes about 3 bytes, and how many are held may be said.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsegrad.basis import Basis
from sparsegrad.core import CoreLinear
from sparsegrad.folded import FoldedLinear
from sparsegrad.gaps import from_gaps, to_gaps
from sparsegrad.linear import SparseGradLinear
from sparsegrad.selecting import SelectingLinear
from sparsegrad.truncated import TruncatedLinear

SAMPLED_COST = 6  # of an entry that is computed alone, in entries of a whole product, on a CPU
HELD = ("weight", "gaps", "values", "differences")


def changed(layer: SparseGradLinear) -> dict[str, Tensor]:
    """What of the weight may differ from the base: ``weight``, or ``values`` at ``gaps`` or of the block."""
    layer.follow()
    moved = layer.moved
    if isinstance(layer, CoreLinear):
        whole = {"weight": layer.weight} if isinstance(layer, TruncatedLinear) and moved is None else {}
        return whole | {"values": layer.rotated_weight().flatten()}
    if moved is None:
        return {"weight": layer.original_weight()}
    return {"gaps": to_gaps(moved), "values": _entries_at(layer, moved)}


def largest_differences(layer: SparseGradLinear, base: Tensor, entries: int | None) -> tuple[dict[str, Tensor], float]:
    """The largest differences from the base in rotated coordinates, rounded to bfloat16.

    Args:
        layer: of form ``folded`` or ``rotated``.
        base: its weight before training, ``(out_features, in_features)``.
        entries: how many at most; None holds all that may differ.

    Returns:
        ``gaps`` and ``differences``; and what is lost, the Frobenius norm of it over that of the whole difference.

    Raises:
        ValueError: if the layer is of the truncated form.
    """
    if not isinstance(layer, SelectingLinear):
        raise ValueError(f"{layer.name} is of the truncated form, whose adapter holds the core as it is.")
    whole = layer.original_weight()
    whole = whole - base.to(whole)
    rotated = (whole if layer.basis is None else layer.basis.rotate(whole)).flatten()
    moved = layer.moved
    places = torch.arange(rotated.numel(), device=rotated.device) if moved is None else moved
    if entries is not None and entries < len(places):
        places = places[rotated[places].abs().topk(entries, sorted=False).indices].sort().values
    held = rotated[places].to(torch.bfloat16)
    norm, outside = float(whole.norm()), 0.0
    if layer.basis is not None and not layer.basis.is_full:
        outside = max(0.0, norm**2 - float(rotated.norm()) ** 2)
    lost = float(rotated.index_add(0, places, -held.to(rotated)).norm()) ** 2 + outside
    return {"gaps": to_gaps(places), "differences": held}, lost**0.5 / norm if norm else 0.0


def fits(held: Mapping[str, Tensor], shape: tuple[int, int], rotated: tuple[int, int]) -> bool:
    """Whether a layer of these shapes can take what is held for it, and something is."""
    weight, values = held.get("weight"), held.get("values", held.get("differences"))
    every = rotated[0] * rotated[1]
    if weight is not None and weight.shape != shape:
        return False
    if values is None or "gaps" not in held:
        return weight is not None if values is None else values.shape == (every,)
    places = from_gaps(held["gaps"])
    return values.shape == places.shape and not (places >= every).any()


def put(layer: SparseGradLinear, held: Mapping[str, Tensor]) -> None:
    """What :func:`changed` or :func:`largest_differences` gave, into a layer of the base model."""
    weight, values = held.get("weight"), held.get("values", held.get("differences"))
    if weight is not None and isinstance(layer, SelectingLinear):
        layer.set_original(weight)
    elif weight is not None and isinstance(layer, TruncatedLinear):
        layer.rebase(layer.basis)
        layer.weight.copy_(weight)
    if values is None:
        return
    places = from_gaps(held["gaps"]) if "gaps" in held else torch.arange(len(values))
    places, values = places.to(layer.trained.device), values.to(layer.trained.device)
    if "values" in held:
        current = _entries_at(layer, places)
        values = values.to(current) - current
    layer.add_(places, values)


def rotated_at(basis: Basis, W: Tensor, indices: Tensor) -> Tensor:
    """``basis.rotate(W).flatten()[indices]``, without what is between them where that costs less.

    Args:
        basis: that the weight is rotated in.
        W: ``(out_features, in_features)``.
        indices: flat, int64 ``(n,)``, ascending, no duplicates.
    """
    (rows, columns), n = basis.ranks, len(indices)
    if W.is_cuda or not basis.rotates_output or not n or n * SAMPLED_COST > rows * columns:
        return basis.rotate(W).flatten()[indices]
    own = W.to(basis.V.dtype)
    left, right = (basis.V, own @ basis.U.T) if columns <= rows else (basis.V @ own, basis.U.T)
    counts = torch.bincount(indices // columns, minlength=rows).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        places = torch.sparse_csr_tensor(
            torch.cat((counts.new_zeros(1), counts)), indices % columns, own.new_zeros(n), (rows, columns),
            check_invariants=False,
        )  # fmt: skip
    return torch.sparse.sampled_addmm(places, left, right, beta=0.0).values()


def _entries_at(layer: SparseGradLinear, places: Tensor) -> Tensor:
    """``rotated_weight().flatten()[places]``."""
    if isinstance(layer, FoldedLinear) and layer.basis is not None:
        return rotated_at(layer.basis, layer.original_weight(), places)
    return layer.rotated_weight().flatten()[places]
