"""Pieces of Markdown pages: rows of tables, estimates with intervals, p-values."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def row(cells: Iterable[Any]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def head(cells: Sequence[Any]) -> str:
    """The head of a Markdown table."""
    return f"{row(cells)}\n{row(['---'] * len(cells))}"


def interval(estimate: Mapping[str, Any] | None, sign: str = "", places: int = 2) -> str:
    """Format an estimate or a difference with its interval; `-` where there is none."""
    if not estimate:
        return "-"
    value, low, high = (estimate.get(name) for name in ("mean" if "mean" in estimate else "value", "low", "high"))
    ends = "no interval" if low is None else f"{low:{sign}.{places}f}, {high:{sign}.{places}f}"
    return f"{value:{sign}.{places}f} [{ends}]"


def p_value(p: float | None) -> str:
    """Format a p-value to two digits; `-` where there is none."""
    if p is None:
        return "-"
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"
