"""What the records say besides scores: environment, models and data, what the runs cost, failures."""

from __future__ import annotations

import statistics
from collections import Counter
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
    if not inputs.found:
        return []
    return [_commits(inputs.found), _versions(inputs.found), *_artefacts(inputs)]


def failures(found: Iterable[Found]) -> list[str]:
    """A sentence for each failed run."""
    failed = [one for one in found if one.content.get("status") == "failed"]
    return [f"{one.path}: failed ({str(one.content.get('error') or 'no error kept')[:200]})" for one in failed]


def time_grid(inputs: PageInputs) -> Grid | None:
    """Time of each kind of run, model and method, with a sum; None where there is no run."""
    groups, rows, total = _groups(inputs, *KINDS), [], 0.0
    for (kind, model, method), members in groups.items():
        spent = [seconds for seconds in map(_seconds, members) if seconds is not None]
        medians = [(one.content.get("training") or {}).get("step_seconds_median") for one in members]
        steps = [seconds for seconds in medians if seconds]
        total += sum(spent)
        rows.append(
            [
                f"{KINDS[kind]}: {method}",
                model,
                str(len(members)),
                _time(sum(spent)) if spent else Text("not recorded", "none"),
                f"{statistics.median(steps):.3g}" if steps else Text("no training", "none"),
            ]
        )
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
            means = [_of(statistics.fmean, counted, name) for name in _MEMORY]
            rows.append([method, model, *means, *(_of(max, counted, name) for name in _PEAKS)])
    if not rows:
        return None
    caption = "Memory in MB (10^6 bytes), means over runs; peaks are a CUDA allocator's, a CPU counts none"
    return Grid(caption, ["method", "model", *_MEMORY.values(), *_PEAKS.values()], rows)


def hosvd_grid(inputs: PageInputs) -> Grid | None:
    """Time and peak memory of the HOSVD by each way and shape; None where it was not measured."""
    rows = []
    for one in inputs.of_kind("hosvd_cost"):
        for case in one.content["cases"]:
            shape = f"{case['name']}, {' × '.join(map(str, case['shape']))}"
            for entry in case["entries"]:
                rows.append([shape, entry["way"].replace("_", " "), str(entry["gradients"]), *_hosvd_cells(entry)])
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
    groups: dict[tuple[str, bool], list[Found]] = {}
    for one in found:
        provenance = one.content["provenance"]
        groups.setdefault((provenance.get("commit") or "no repository", bool(provenance.get("dirty"))), []).append(one)
    rows = [
        [
            Text(commit[:12], "code"),
            Text("yes", "strong") if dirty else "no",
            str(len(members)),
            ", ".join(sorted({_kind(one) for one in members})),
        ]
        for (commit, dirty), members in groups.items()
    ]
    return Grid("Code behind the records", ["commit", "uncommitted changes", "records", "of"], rows)


def _versions(found: Iterable[Found]) -> Grid:
    """Every version that occurs, with the number of records where there is more than one."""
    values: dict[str, Counter[str]] = {}
    for one in found:
        provenance, device = one.content["provenance"], one.content.get("device")
        given = {"Python": provenance.get("python"), "platform": provenance.get("platform")}
        given |= provenance.get("packages") or {}
        if device:
            threads = f", {device['threads']} threads" if "threads" in device else ""
            given["device"] = f"{device.get('type')}, {device.get('name')}{threads}"
        for key, value in given.items():
            values.setdefault(key, Counter())[value or "not installed"] += 1
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
        if not isinstance(model, Mapping) or not isinstance(data, Mapping):
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


def _kind(one: Found) -> str:
    """What a record is of, for readers; one without a kind is named by its folder."""
    return KINDS.get(one.kind) or (one.kind or Path(one.path).parent.name).replace("_", " ")


def _groups(inputs: PageInputs, *kinds: str) -> dict[tuple[str, str, str], list[Found]]:
    """Records by (kind, model, label of the method), in the order of the kinds."""
    groups: dict[tuple[str, str, str], list[Found]] = {}
    for one in inputs.of_kind(*kinds):
        method = inputs.labels.method(one.run["method"]) if "method" in one.run else "all variants"
        groups.setdefault((one.kind, one.run["model"], method), []).append(one)
    return groups


def _seconds(one: Found) -> float | None:
    """Time that a record says its run took."""
    if one.content.get("training"):
        return one.content["training"].get("seconds")
    if "trials" in one.content:
        return sum(trial.get("seconds") or 0.0 for trial in one.content["trials"])
    return one.content.get("seconds")


def _of(take: Any, counted: Iterable[Mapping[str, Any]], name: str) -> str | Text:
    """Mean or maximum of a component over runs, in MB."""
    known = [one[name] for one in counted if one.get(name) is not None]
    return _megabytes(take(known) if known else None)


def _megabytes(value: float | None) -> str | Text:
    return Text("not counted", "none") if value is None else f"{value / 1e6:,.2f}"


def _time(seconds: float) -> str:
    """Hours, minutes or seconds, whichever reads best."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"
