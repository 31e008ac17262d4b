"""Pieces of Markdown pages: tables, estimates with intervals, p-values."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune.report.paper.layouts import METHODS

LABELS = {method: label for label, method in METHODS.items()}
"""Method -> the paper's name for it; a variant keeps its own."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lay out a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(str(text).replace('|', chr(92) + '|') for text in line)} |" for line in lines]


def label(method: str) -> str:
    """Name a method for readers."""
    return LABELS.get(method, method)


def interval(estimate: Mapping[str, Any] | None, sign: str = "", places: int = 2) -> str:
    """Format an estimate or a difference with its interval; `-` where there is none."""
    if estimate is None:
        return "-"
    value = estimate["mean"] if "mean" in estimate else estimate["value"]
    text = f"{value:{sign}.{places}f}"
    if estimate["low"] is None:
        return f"{text} [no interval]"
    return f"{text} [{estimate['low']:{sign}.{places}f}, {estimate['high']:{sign}.{places}f}]"


def p_value(p: float) -> str:
    """Format a p-value to two digits."""
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"
