"""What the runs cost, from their records: time, memory by component, and the HOSVD of the bases."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune.report.page.markup import Child, Html, grid, tag
from finetune.report.page.page_records import KINDS, Found

_MEMORY = ("parameters", "gradients", "optimizer_state", "bases", "saved_activations")
"""Components whose bytes every training record counts from its tensors."""

_PEAKS = ("peak_training", "peak_evaluation")
"""The CUDA allocator's peaks; a CPU has none."""


def cost_html(found: Sequence[Found]) -> Html | None:
    """Time of each kind of run, model and method, with a sum; None where nothing says how long it took."""
    groups = _groups(found, KINDS)
    rows: list[list[Child]] = []
    total = 0.0
    for (kind, model, method), members in groups.items():
        spent = [seconds for seconds in map(_seconds, members) if seconds is not None]
        steps = [seconds for seconds in map(_step_seconds, members) if seconds is not None]
        total += sum(spent)
        rows.append(
            [
                f"{KINDS[kind]}: {method}",
                model,
                str(len(members)),
                _time(sum(spent)) if spent else "not recorded",
                f"{statistics.median(steps):.3g}" if steps else "no training",
            ]
        )
    if not rows:
        return None
    rows.append(["all of these", "every model", str(sum(map(len, groups.values()))), _time(total), "different steps"])
    head = ["what", "model", "records", "time", "seconds a step (median)"]
    return grid(head, rows, "Time: sums of what the records measured, evaluations included")


def memory_html(found: Sequence[Found]) -> Html | None:
    """Memory by component of training runs, and the allocator's peaks; None where no record counts it."""
    rows: list[list[Child]] = []
    for (_, model, method), members in _groups(found, ("train", "llama")).items():
        counted = [member.content["memory"] for member in members if member.content.get("memory")]
        if counted:
            means = [_mean([one.get(name) for one in counted]) for name in _MEMORY]
            peaks = [_most([one.get(name) for one in counted]) for name in _PEAKS]
            rows.append([method, model, *map(_megabytes, [*means, *peaks])])
    if not rows:
        return None
    head = ["method", "model", "weights", "gradients", "optimizer", "bases", "activations"]
    caption = "Memory in MB (10^6 bytes), means over runs; peaks are a CUDA allocator's, a CPU counts none"
    return grid([*head, "peak, training", "peak, evaluation"], rows, caption)


def hosvd_html(found: Sequence[Found]) -> Html | None:
    """Time and peak memory of the HOSVD by each way and shape; None where it was not measured."""
    rows: list[list[Child]] = []
    for one in found:
        for case in one.content.get("cases", ()) if one.kind == "hosvd_cost" else ():
            shape = f"{case['name']}, {' × '.join(map(str, case['shape']))}"
            for entry in case["entries"]:
                rows.append([shape, entry["way"].replace("_", " "), str(entry["gradients"]), *_hosvd_cells(entry)])
    if not rows:
        return None
    caption = "HOSVD of stacked gradients (D24); the paper names 78 s for BERT and 668 s for LLaMa-2 on another CPU"
    return grid(["matrix", "way", "gradients", "seconds", "peak, MB", "how known"], rows, caption)


def _hosvd_cells(entry: Mapping[str, Any]) -> list[Child]:
    """Seconds, peak and how they are known, of one way."""
    if entry.get("seconds") is not None:  # a way that was not measured has none
        return [f"{entry['seconds']['total']:.3g}", _megabytes(entry["peak_bytes"]), "measured"]
    calculated = entry["calculated"]
    seconds = f"{calculated['seconds']:.3g}" if calculated["seconds"] is not None else "not known"
    reason = f": {entry['reason']}" if entry["reason"] else ""
    return [seconds, _megabytes(calculated["bytes"]), f"calculated{reason}"]


def _groups(found: Iterable[Found], kinds: Iterable[str]) -> dict[tuple[str, str, str], list[Found]]:
    """Records by (kind, model, method), in the order of the kinds."""
    order = list(kinds)
    groups: dict[tuple[str, str, str], list[Found]] = {}
    for one in sorted((one for one in found if one.kind in order), key=lambda one: (order.index(one.kind), one.path)):
        groups.setdefault((one.kind, one.run["model"], one.run.get("method", "all variants")), []).append(one)
    return groups


def _step_seconds(one: Found) -> float | None:
    """Median time of a step, of a training run that got so far."""
    return (one.content.get("training") or {}).get("step_seconds_median")


def _seconds(one: Found) -> float | None:
    """Time that a record says its run took."""
    content = one.content
    if content.get("training"):
        return content["training"].get("seconds")
    if "trials" in content:
        return sum(trial.get("seconds") or 0.0 for trial in content["trials"])
    return content.get("seconds")


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _megabytes(value: float | None) -> Child:
    return tag("span", "not counted", class_="none") if value is None else f"{value / 1e6:,.2f}"


def _time(seconds: float) -> str:
    """Hours, minutes or seconds, whichever reads best."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"
