"""Which entries of a gradient are kept: exactly k, by absolute value, ties to the lowest flat index (D6)."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteGradient(ValueError):
    """A gradient holds NaN or infinity: training has diverged."""


def check_k(k: int, shape: tuple[int, int]) -> int:
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
    if not 0 < density <= 1:
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
    # topk orders NaN above everything, so its first value tells whether all entries are finite.
    largest = torch.topk(magnitude, k, sorted=True).values
    if not torch.isfinite(largest[0]):
        raise NonFiniteGradient("gradient holds non-finite values: lower the learning rate or check the loss.")
    threshold = largest[-1]
    above = magnitude > threshold
    missing = k - int(above.sum())
    ties = (magnitude == threshold).nonzero().flatten()[:missing]
    above[ties] = True
    return above.nonzero().flatten()
