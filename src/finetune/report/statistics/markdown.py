"""Pieces of Markdown pages: rows of tables, estimates with intervals, p-values."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def row(cells: Iterable[Any]) -> str:
    """Lay out a line of a Markdown table."""
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def head(cells: Sequence[Any]) -> str:
    """Lay out the head of a Markdown table."""
    return f"{row(cells)}\n{row(['---'] * len(cells))}"


def interval(estimate: Mapping[str, Any] | None, sign: str = "", places: int = 2) -> str:
    """Format an estimate or a difference with its interval; `-` where there is none."""
    if not estimate:
        return "-"
    value = estimate["mean"] if "mean" in estimate else estimate["value"]
    text = f"{value:{sign}.{places}f}"
    if estimate["low"] is None:
        return f"{text} [no interval]"
    return f"{text} [{estimate['low']:{sign}.{places}f}, {estimate['high']:{sign}.{places}f}]"


def p_value(p: float | None) -> str:
    """Format a p-value to two digits; `-` where there is none."""
    if p is None:
        return "-"
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"
