"""How concentrated one matrix is: the numbers behind the paper's claim that rotated gradients are sparse (Figure 2).

The energy of a matrix is its squared Frobenius norm, which no rotation changes; what a rotation changes is how few
entries hold it. All shares lie between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured of a matrix.

    Attributes:
        shares: of the entries, largest first, whose energy is summed.
        stripe_shares: of the rows and of the columns, those of most energy first.
        levels: an entry counts as large from this multiple of the largest absolute value on.
        threshold: an entry counts as above it by absolute value; the released code's fixed cut is 1e-3 (D6).
    """

    shares: Sequence[float]
    stripe_shares: Sequence[float]
    levels: Sequence[float]
    threshold: float


@dataclass(frozen=True)
class Concentration:
    """What :func:`measure` finds in a matrix; lists follow :class:`MeasureOptions`.

    Attributes:
        energy: share of the energy in the largest ``shares`` of the entries.
        rows, columns: share of the energy in the ``stripe_shares`` of the rows, columns.
        block: share of the energy in the leading block, the core of the truncated form.
        large: share of the entries from ``levels`` of the largest on.
        above: share of the entries above ``threshold``.
        zero: share of the entries that are exactly zero.
        norm: Frobenius norm.
    """

    energy: list[float]
    rows: list[float]
    columns: list[float]
    block: float
    large: list[float]
    above: float
    zero: float
    norm: float


def measure(G: Tensor, ranks: tuple[int, int], options: MeasureOptions) -> Concentration:
    """Concentration of a matrix.

    Args:
        G: ``(out_features, in_features)``, any float dtype.
        ranks: rows and columns of the leading block.

    Raises:
        ValueError: if the matrix is zero or not finite, for then no share is defined.
    """
    size = G.detach().abs()
    squares = size.double().square()
    total, largest = float(squares.sum()), float(size.max())
    if not 0 < total < float("inf"):
        raise ValueError(f"a gradient of shape {tuple(G.shape)} has norm {total**0.5}: no share of it is defined.")
    return Concentration(
        energy=energy_in_largest(squares.flatten(), options.shares),
        rows=energy_in_largest(squares.sum(dim=1), options.stripe_shares),
        columns=energy_in_largest(squares.sum(dim=0), options.stripe_shares),
        block=float(squares[: ranks[0], : ranks[1]].sum()) / total,
        large=[float((size >= level * largest).double().mean()) for level in options.levels],
        above=float((size > options.threshold).double().mean()),
        zero=float((size == 0).double().mean()),
        norm=total**0.5,
    )


def energy_in_largest(squares: Tensor, shares: Sequence[float]) -> list[float]:
    """Share of a vector's sum in its largest values.

    Args:
        squares: ``(n,)``, not negative, float64.
        shares: of the n values; at least one value is taken.
    """
    counts = [max(1, round(share * len(squares))) for share in shares]
    largest = torch.topk(squares, counts[-1]).values
    sums = largest.cumsum(dim=0)
    return (sums[torch.tensor(counts, device=sums.device) - 1] / squares.sum()).clamp(max=1.0).tolist()


def pool(G: Tensor, rows: int, columns: int) -> Tensor:
    """A small picture of a matrix: the largest absolute value of each tile, as a share of the largest of all.

    The largest, not the mean: a few entries of a tile may hold all of its energy, and they are what is looked for.

    Args:
        G: ``(m, n)``.
        rows, columns: of the picture; a side that is no longer than that stays as it is.

    Returns:
        ``(min(m, rows), min(n, columns))``, float16, from 0 to 1.
    """
    size = G.detach().abs().float()
    shape = (min(size.shape[0], rows), min(size.shape[1], columns))
    tiles = F.adaptive_max_pool2d(size[None], shape)[0]
    return (tiles / size.max().clamp(min=torch.finfo(torch.float32).tiny)).to(torch.float16).cpu()


def average(found: Sequence[Concentration]) -> dict[str, Any]:
    """Mean over batches of every number, and ``energy_sd``, the standard deviation of ``energy`` (n - 1)."""
    columns: dict[str, Any] = {}
    for name in asdict(found[0]):
        values = torch.tensor([getattr(one, name) for one in found], dtype=torch.float64)
        columns[name] = _rounded(values.mean(dim=0))
        if name == "energy":
            columns["energy_sd"] = _rounded(values.std(dim=0)) if len(found) > 1 else None
    return columns


def _rounded(values: Tensor) -> Any:
    """Five significant digits: a record is read by people too."""
    if values.dim() == 0:
        return float(f"{float(values):.5g}")
    return [float(f"{value:.5g}") for value in values.tolist()]
