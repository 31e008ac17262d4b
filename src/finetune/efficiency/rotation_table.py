"""The rotation's record as a table: means over seeds; of what is selected, over looks and layer kinds too.

Losses of other rotations are differences from float32's, with the least and the greatest over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

REFERENCE = "float32"
GRADIENT = "gradient_without_dropout"
"""Beside the rotations: float64's selection from the gradient under autocast, against that from float32's gradient."""

HEAD = ("task, training", "rotation", "same entries", "energy", "training loss", "validation", "step, ms", "whole, ms")
Entry = Mapping[str, Any]  # one repetition


def table_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """A row for each task, precision of training and rotation, in the columns of :data:`HEAD`."""
    rows = []
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in record["entries"]:
        groups.setdefault((entry["task"], entry["precision"]), []).append(entry)
    for (task, precision), entries in groups.items():
        for rotation in entries[0]["rotations"]:
            rows.append([f"{task}, {precision}", rotation, *_cells(entries, rotation)])
        if any(GRADIENT in kind for look in entries[0]["looks"] for kind in look["kinds"].values()):
            rows.append([f"{task}, {precision}", "(the gradient itself)", *_selected(entries, GRADIENT), *["-"] * 4])
    return rows


def _cells(entries: Sequence[Entry], rotation: str) -> list[str]:
    found = [entry["rotations"][rotation] for entry in entries]
    losses = [one["loss"] for one in found]
    loss = f"{fmean(losses):.4f}"
    if rotation != REFERENCE:
        pairs = zip(losses, entries, strict=True)
        apart = [own - entry["rotations"][REFERENCE]["loss"] for own, entry in pairs]
        loss = f"{fmean(apart):+.4f} ({min(apart):+.4f} to {max(apart):+.4f})"
    scores = f"{fmean(one['validation'][entries[0]['metric']] for one in found):.4f}"
    times = [f"{fmean(one[name] for one in found):.2f}" for name in ("optimizer_ms", "step_ms")]
    return [*_selected(entries, rotation), loss, scores, *times]


def _selected(entries: Sequence[Entry], rotation: str) -> list[str]:
    shares = [kind[rotation] for entry in entries for look in entry["looks"] for kind in look["kinds"].values()]
    agree, energy = (100 * fmean(one[name] for one in shares) for name in ("agree", "energy"))
    return [f"{agree:.2f} %", f"{energy:.4f} %"]
