"""Which entries of a gradient are kept: exactly k, by absolute value, ties to the lowest flat index (D6).

Another rule is one function of the gradient and k, given to :func:`sparsegrad.sparsify` as ``select``.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

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
        raise ValueError(f"k={k!r}; a matrix of shape {tuple(shape)} allows whole numbers from 1 to {entries}.")
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
    magnitude = G.detach().abs().flatten()
    if not torch.isfinite(magnitude.max()):  # NaN is the maximum of whatever holds one
        raise NonFiniteGradient
    candidates = _candidates(magnitude, k, G.shape[1])
    values = magnitude if candidates is None else magnitude[candidates]
    threshold = torch.topk(values, k, sorted=False).values.min()
    above = values > threshold
    missing = k - int(above.sum())
    ties = (values == threshold).nonzero().flatten()[:missing]
    above[ties] = True
    kept = above.nonzero().flatten()
    return kept if candidates is None else candidates[kept]


def selected(G: Tensor, k: int, rule: Rule = top_k) -> tuple[Tensor, Tensor]:
    """The entries that a rule keeps: flat indices int64 ``(k,)``, ascending, and their values.

    Raises:
        ValueError: if the rule gives anything else.
        NonFiniteGradient: if G is not finite.
    """
    if rule is top_k:  # it has its own checks, and its indices need none
        indices = top_k(G, k)
    else:
        if not torch.isfinite(G).all():
            raise NonFiniteGradient
        indices = rule(G, k)
        _check_kept(indices, k, G.numel(), rule)
    return indices, G.flatten()[indices]


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


def _candidates(magnitude: Tensor, k: int, width: int) -> Tensor | None:
    """Flat indices, ascending, of all entries above a bound that at least k entries reach; None if it would not pay.

    topk over every entry costs several times what it costs over these: about six on a CPU at BERT's size. The bound is
    guessed from a sample, and counted before it is used, so that the selection stays exact.
    """
    stride = _STRIDE
    while gcd(stride, width) > 1:  # else the sample would see some columns alone
        stride += 1
    sample = magnitude[::stride]
    wanted = int(_MARGIN * k / stride) + _SPARE
    if wanted >= len(sample) // 2:
        return None
    bound = torch.topk(sample, wanted, sorted=False).values.min()
    candidates = (magnitude >= bound).nonzero().flatten()
    return candidates if k <= len(candidates) < len(magnitude) // 2 else None
