"""What the records say besides scores: environment, models and data, and what the runs cost."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.report.page.blocks import Grid, Text
from finetune.report.page.inputs import Found, PageInputs

KINDS = {
    "search": "search",
    "train": "GLUE training",
    "llama": "decoder training",
    "answers": "answers",
    "judgments": "judgments",
    "efficiency": "speed and memory",
}
"""Kind of a record -> its name on the page, in the order of the page."""

TRAINING = ("train", "llama")

_MEMORY = {"parameters": "weights", "gradients": "gradients", "optimizer_state": "optimizer", "bases": "bases",
           "saved_activations": "activations"}  # fmt: skip
"""Components whose bytes every training record counts from its tensors -> column."""

_PEAKS = {"peak_training": "peak, training", "peak_evaluation": "peak, evaluation"}
"""The CUDA allocator's peaks; a CPU has none."""


def environment(inputs: PageInputs) -> list[Grid]:
    """Commits, packages, machines, models and data of all records."""
    return [_commits(inputs.found), _versions(inputs.found), *_artefacts(inputs)] if inputs.found else []


def time_grid(inputs: PageInputs) -> Grid | None:
    """Time of each kind of run, model and method, with a sum; None where there is no run."""
    groups, rows, total = _groups(inputs, *KINDS), [], 0.0
    for (kind, model, method), members in groups.items():
        spent = [seconds for seconds in map(_seconds, members) if seconds is not None]
        steps = [step for one in members if (step := (one.content.get("training") or {}).get("step_seconds_median"))]
        total += sum(spent)
        time = _time(sum(spent)) if spent else Text("not recorded", "none")
        step = f"{statistics.median(steps):.3g}" if steps else Text("no training", "none")
        rows.append([f"{KINDS[kind]}: {method}", model, str(len(members)), time, step])
    if not rows:
        return None
    rows.append(["all of these", "every model", str(sum(map(len, groups.values()))), _time(total), "different steps"])
    head = ["what", "model", "records", "time", "seconds a step (median)"]
    return Grid("Time: sums of what the records measured, evaluations included", head, rows)


def memory_grid(inputs: PageInputs) -> Grid | None:
    """Memory by component of training runs, and the allocator's peaks; None where no record counts it."""
    rows = []
    for (_, model, method), members in _groups(inputs, *TRAINING).items():
        if counted := [one.content["memory"] for one in members if one.content.get("memory")]:
            taken = [(statistics.fmean, name) for name in _MEMORY] + [(max, name) for name in _PEAKS]
            known = [(take, [one[name] for one in counted if one.get(name) is not None]) for take, name in taken]
            rows.append([method, model, *(_megabytes(take(values) if values else None) for take, values in known)])
    caption = "Memory in MB (10^6 bytes), means over runs; peaks are a CUDA allocator's, a CPU counts none"
    return Grid(caption, ["method", "model", *_MEMORY.values(), *_PEAKS.values()], rows) if rows else None


def hosvd_grid(inputs: PageInputs) -> Grid | None:
    """Time and peak memory of the HOSVD by each way and shape; None where it was not measured."""
    rows = [
        [
            f"{case['name']}, {' × '.join(map(str, case['shape']))}",
            entry["way"].replace("_", " "),
            str(entry["gradients"]),
            *_hosvd_cells(entry),
        ]
        for one in inputs.of_kind("hosvd_cost")
        for case in one.content["cases"]
        for entry in case["entries"]
    ]
    caption = "HOSVD of stacked gradients (D24); the paper names 78 s for BERT and 668 s for LLaMa-2 on another CPU"
    head = ["matrix", "way", "gradients", "seconds", "peak, MB", "how known"]
    return Grid(caption, head, rows) if rows else None


def _hosvd_cells(entry: Mapping[str, Any]) -> list[str | Text]:
    """Seconds, peak and how they are known, of one way."""
    if entry.get("seconds") is not None:  # a way that was not measured has none
        return [f"{entry['seconds']['total']:.3g}", _megabytes(entry["peak_bytes"]), "measured"]
    calculated, reason = entry["calculated"], f": {entry['reason']}" if entry["reason"] else ""
    seconds = f"{calculated['seconds']:.3g}" if calculated["seconds"] is not None else Text("not known", "none")
    return [seconds, _megabytes(calculated["bytes"]), f"calculated{reason}"]


def _commits(found: Iterable[Found]) -> Grid:
    groups: dict[tuple[str, str | Text], list[str]] = defaultdict(list)
    for one in found:
        provenance, kind = one.content["provenance"], one.kind or Path(one.path).parent.name
        dirty = Text("yes", "strong") if provenance.get("dirty") else "no"
        groups[provenance.get("commit") or "no repository", dirty].append(KINDS.get(kind, kind.replace("_", " ")))
    rows = [
        [Text(commit[:12], "code"), dirty, str(len(kinds)), ", ".join(sorted({*kinds}))]
        for (commit, dirty), kinds in groups.items()
    ]
    return Grid("Code behind the records", ["commit", "uncommitted changes", "records", "of"], rows)


def _versions(found: Iterable[Found]) -> Grid:
    """Every version that occurs, with the number of records where there is more than one."""
    values: dict[str, Counter[str]] = defaultdict(Counter)
    for one in found:
        provenance, device = one.content["provenance"], one.content.get("device")
        given = {"Python": provenance.get("python"), "platform": provenance.get("platform")}
        given |= provenance.get("packages") or {}
        if device:
            threads = f", {device['threads']} threads" if "threads" in device else ""
            given["device"] = f"{device.get('type')}, {device.get('name')}{threads}"
        for key, value in given.items():
            values[key][value or "not installed"] += 1
    rows = [
        [key, "; ".join(f"{value} ({n} records)" if len(counts) > 1 else value for value, n in counts.items())]
        for key, counts in values.items()
    ]
    return Grid("Versions and machines", ["what", "version"], rows)


def _artefacts(inputs: PageInputs) -> Iterator[Grid]:
    """Models and data by name, revision and hash."""
    rows: dict[str, list[str]] = {}
    for one in inputs.of_kind(*TRAINING):
        model, data = one.content.get("model"), one.content.get("data")
        if not model or not data:
            continue
        weights = "random weights" if model.get("random_weights") else f"sha256 {str(model.get('sha256'))[:12]}"
        place = model.get("checkpoint") or "a local folder"
        rows[f"model {model.get('title')}"] = [place, str(model.get("revision") or "none")[:12], weights]
        sums = ", ".join(f"{name} {str(value)[:12]}" for name, value in data.get("sha256", {}).items())
        sizes = ", ".join(f"{count:,} {name}" for name, count in data.get("rows", {}).items())
        rows[f"data {data.get('task')}"] = [f"{sizes} rows", "by content", f"sha256 {sums}"]
    if rows:
        lines = [[name, *cells] for name, cells in sorted(rows.items(), reverse=True)]
        yield Grid("Models and data", ["what", "from", "revision", "content"], lines)


def _groups(inputs: PageInputs, *kinds: str) -> dict[tuple[str, str, str], list[Found]]:
    """Records by (kind, model, label of the method), in the order of the kinds."""
    groups: dict[tuple[str, str, str], list[Found]] = defaultdict(list)
    for one in inputs.of_kind(*kinds):
        method = inputs.labels.method(one.run["method"]) if "method" in one.run else "all variants"
        groups[one.kind, one.run["model"], method].append(one)
    return groups


def _seconds(one: Found) -> float | None:
    """Time that a record says its run took."""
    if one.content.get("training"):
        return one.content["training"].get("seconds")
    if "trials" in one.content:
        return sum(trial.get("seconds") or 0.0 for trial in one.content["trials"])
    return one.content.get("seconds")


def _megabytes(value: float | None) -> str | Text:
    return Text("not counted", "none") if value is None else f"{value / 1e6:,.2f}"


def _time(seconds: float) -> str:
    """Hours, minutes or seconds, whichever reads best."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"
