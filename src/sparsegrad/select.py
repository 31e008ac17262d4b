"""Which entries of a gradient are kept: exactly k, by absolute value, ties to the lowest flat index (D6).

Another rule is one function of the gradient and k, given to :func:`sparsegrad.sparsify` as ``select``.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

from sparsegrad import kernels

Rule = Callable[[Tensor, int], Tensor]
"""A gradient ``(rows, columns)`` in rotated coordinates and k, to k flat indices: int64, ascending, no duplicates."""

_STRIDE, _MARGIN, _SPARE = 61, 1.25, 32  # of the sample that guesses a bound for the kept entries


class NonFiniteGradient(ValueError):
    """A gradient holds NaN or infinity: training has diverged."""

    def __init__(self, *names: str) -> None:
        of = f" of {', '.join(filter(None, names[:4]))}" if any(names) else ""
        super().__init__(f"gradient{of} holds non-finite values: lower the learning rate or check the loss.")


def check_k(k: int, shape: tuple[int, ...]) -> int:
    """Return k if a matrix of this shape has that many entries.

    Raises:
        ValueError: if not; the message names the limit.
    """
    entries = shape[0] * shape[1]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= entries:
        raise ValueError(
            f"k={k!r}; a matrix of shape {tuple(shape)} allows whole numbers from 1 to {entries}; of a share, "
            "entries_for_density makes one."
        )
    return k


def entries_for_density(density: float, shape: tuple[int, int]) -> int:
    """k for a share of a matrix' entries, at least one.

    Raises:
        ValueError: if the density is not in (0, 1].
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density={density}; allowed: above 0, at most 1 (the paper keeps about 0.01).")
    return max(1, round(density * shape[0] * shape[1]))


def top_k(G: Tensor, k: int) -> Tensor:
    """Flat indices of the k entries of largest absolute value.

    Args:
        G: ``(out_features, in_features)``, any float dtype.
        k: entries to keep, 1 to ``G.numel()``.

    Returns:
        int64 ``(k,)``, ascending.

    Raises:
        ValueError: if k is out of range.
        NonFiniteGradient: if G is not finite.
    """
    check_k(k, tuple(G.shape))
    places, _, finite = top_k_of_each(G.detach()[None], k)
    if not finite.all():
        raise NonFiniteGradient
    return places[0]


def top_k_of_each(G: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`top_k` of several matrices at once, in few operations, of which at most two wait for the device.

    Args:
        G: ``(matrices, out_features, in_features)``, any float dtype.
        k: entries to keep of each matrix.

    Returns:
        Flat indices in each matrix, int64 ``(matrices, k)``, ascending; their values ``(matrices, k)``; and whether a
        matrix is finite, bool ``(matrices,)``. Of one that is not, indices and values mean nothing.
    """
    if kernels.selects(G):
        places, values, all_finite = kernels.radix_top_k(G.flatten(1).float(), k)
        return places, values, all_finite.expand(len(G))
    matrices, width, entries = len(G), G.shape[2], G[0].numel()
    flat = G.flatten(1)
    magnitude = flat.abs()
    finite = torch.isfinite(magnitude.amax(1))  # NaN is the maximum of whatever holds one
    candidates = (magnitude >= _bound(magnitude, k, width)).flatten().nonzero().flatten()
    starts = torch.arange(matrices + 1, device=G.device) * entries
    counts = torch.searchsorted(candidates, starts).diff()
    least, most = torch.stack((counts.min(), counts.max())).tolist()
    if least < k:  # a guess too high, or NaN, which reaches nothing
        candidates = torch.arange(magnitude.numel(), device=G.device)
        counts, most = torch.full_like(counts, entries), entries
    matrix = candidates // entries
    place = torch.arange(len(candidates), device=G.device) - (counts.cumsum(0) - counts)[matrix]
    table = magnitude.new_full((matrices, most), -1.0)  # the candidates of each matrix, in their order
    table[matrix, place] = magnitude.flatten()[candidates]
    threshold = torch.topk(table, k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, ties = table > threshold, table == threshold
    above |= ties & (ties.cumsum(1) <= k - above.sum(1, keepdim=True))
    kept = torch.nonzero_static(above[matrix, place], size=matrices * k).flatten()
    places = candidates[kept].view(matrices, k) - torch.arange(matrices, device=G.device)[:, None] * entries
    return places, flat.gather(1, places.clamp(0, entries - 1)), finite


def selected(G: Tensor, k: int, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """What a rule keeps of several matrices, as :func:`top_k_of_each` returns it; it is asked of finite ones alone.

    Raises:
        ValueError: if the rule gives anything else.
    """
    if rule is top_k:
        return top_k_of_each(G, k)
    finite = torch.isfinite(G).flatten(1).all(1)
    kept = [rule(matrix, k) if good else torch.arange(k) for matrix, good in zip(G, finite.tolist(), strict=True)]
    for indices in kept:
        _check_kept(indices, k, G[0].numel(), rule)
    places = torch.stack([indices.to(G.device) for indices in kept])
    return places, G.flatten(1).gather(1, places), finite


def _check_kept(indices: object, k: int, entries: int, rule: Rule) -> None:
    if not isinstance(indices, Tensor):
        what = type(indices).__name__
    elif indices.dtype != torch.int64 or indices.shape != (k,):
        what = f"{indices.dtype} {tuple(indices.shape)}"
    elif indices[0] < 0 or indices[-1] >= entries or (indices.diff() <= 0).any():
        what = f"indices from {int(indices.min())} to {int(indices.max())}, or in another order"
    else:
        return
    name = getattr(rule, "__name__", type(rule).__name__)
    expected = f"a rule gives {k} flat indices, int64 and ascending, each once, from 0 to {entries - 1}"
    raise ValueError(f"select={name} gave {what}; {expected}.")


def insert_sorted(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Union of two ascending int64 index vectors.

    Returns:
        The union, ascending; the places in it of the old indices; the places in it of the new ones.
    """
    at = torch.searchsorted(old, new)
    known = at < len(old)
    known[known.clone()] = old[at[known]] == new[known]
    added = new[~known]
    union = old.new_empty(len(old) + len(added))
    place_old = torch.arange(len(old), device=old.device) + torch.searchsorted(added, old)
    place_added = torch.arange(len(added), device=old.device) + torch.searchsorted(old, added)
    union[place_old], union[place_added] = old, added
    return union, place_old, torch.searchsorted(union, new)


def _bound(magnitude: Tensor, k: int, width: int) -> Tensor:
    """A bound that about k entries of each matrix reach, ``(matrices, 1)``.

    On CUDA it is the k-th largest entry itself. On a CPU topk over every entry costs several times what it costs over
    the entries above a guess (about six at BERT's size), so it is guessed from a sample, a little low; the caller
    counts.
    """
    if magnitude.is_cuda:
        return torch.topk(magnitude, k, dim=1, sorted=False).values.amin(1, keepdim=True)
    stride = _STRIDE
    while gcd(stride, width) > 1:  # else the sample would see some columns alone
        stride += 1
    sample = magnitude[:, ::stride]
    wanted = int(_MARGIN * k / stride) + _SPARE
    if wanted >= sample.shape[1] // 2:
        return magnitude.new_zeros(len(magnitude), 1)
    return torch.topk(sample, wanted, dim=1, sorted=False).values.amin(1, keepdim=True)
