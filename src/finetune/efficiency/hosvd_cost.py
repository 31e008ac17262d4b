"""Time and peak memory of the ways to the HOSVD factors, each measured alone in a fresh process, and their subspaces.

What does not fit or takes too long is in the record all the same, with the reason and what it would take by formula.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finetune.efficiency import machine
from finetune.efficiency.hosvd_ways import REFERENCE, WAYS, angle, flop, peak_bytes
from finetune.efficiency.stage import Stage
from finetune.store import records
from sparsegrad import load_tensors

WORKER = ["-m", "finetune.efficiency.hosvd_ways"]
SPARE = 0.8  # share of the free memory that a way may take
Entry = dict[str, Any]  # one way at one number of gradients


@dataclass(frozen=True)
class Case:
    """Gradients of one shape.

    Attributes:
        name: in the record.
        shape: ``(out_features, in_features)``.
        asked: number of gradients that all ways are compared at; where one is not measured there, it is calculated.
        ways: way -> numbers of gradients to measure.
    """

    name: str
    shape: tuple[int, int]
    asked: int
    ways: Mapping[str, Sequence[int]]

    def plan(self) -> list[tuple[str, int]]:
        """(way, number of gradients), small numbers first, those that are asked for among them."""
        ways = sorted(self.ways, key=WAYS.index)
        return [(way, n) for way in ways for n in sorted({*self.ways[way], self.asked})]


@dataclass(frozen=True)
class HosvdOptions:
    """How to measure.

    Attributes:
        rank: of the planted subspace, which is compared.
        noise: of the gradients, see :class:`finetune.efficiency.hosvd_ways.Gradients`.
        limit_bytes: a way that needs more by formula is not started; None: 0.8 of the free memory alone.
        limit_seconds: a way that takes longer is stopped.
        threads: of torch on the CPU; None leaves torch's choice.
    """

    rank: int
    noise: float
    limit_bytes: float | None
    limit_seconds: float
    device: str = "auto"
    threads: int | None = None
    seed: int = 0


def read_config(config: Mapping[str, Any]) -> tuple[list[Case], HosvdOptions]:
    """Cases and options of a composed ``conf/hosvd_cost.yaml``."""
    scale = config["scale"]
    cases = [
        Case(name, tuple(given["shape"]), given["asked"], {way: list(n) for way, n in given["ways"].items()})
        for name, given in scale["cases"].items()
    ]
    own = {name: config[name] for name in ("rank", "noise", "device", "threads", "seed")}
    return cases, HosvdOptions(limit_bytes=scale["limit_bytes"], limit_seconds=scale["limit_seconds"], **own)


def hosvd_cost(cases: Sequence[Case], options: HosvdOptions, stage: Stage) -> dict[str, Any]:
    """Measure all cases and write the record, or read it where it is finished.

    Raises:
        ValueError: if the device is missing or others use it, or a measurement is refused.
    """

    def measure(device: torch.device, folder: Path) -> dict[str, Any]:
        plan = [(case, way, n) for case in cases for way, n in case.plan()]
        progress = tqdm(plan, desc="hosvd", disable=not stage.progress)
        found = [(case, _measure(case, way, n, options, device, folder)) for case, way, n in progress]
        for case, entry in found:
            entry["calculated"] = _calculated(case, entry, found)
        parts = [_case_record(case, [entry for one, entry in found if one is case], folder) for case in cases]
        return {"treatment": treatment, "cases": parts}

    treatment = {
        **asdict(options),
        "gradients": "made one at a time: a planted subspace of that rank, and noise; making them is not timed",
        "processes": "each measurement in a fresh process, libraries loaded and warm",
        "cpu_seconds": "time that the process ran on a CPU, all threads; what others took from it is not in it",
    }
    content = {"cases": [asdict(case) for case in cases], "options": asdict(options)}
    return stage.run(content, measure, device=options.device, threads=options.threads)


def summary(record: Mapping[str, Any]) -> list[str]:
    """The record in a few lines; what is calculated is in brackets."""

    def shown(value: float | None, form: str) -> str:
        return "unknown" if value is None else format(value, form)

    lines = []
    for case in record["cases"]:
        lines.append(f"{case['name']}: gradients of {case['shape'][0]} x {case['shape'][1]}")
        for entry in case["entries"]:
            seconds, size = _cost(entry)
            text = f"{shown(seconds, '.4g')} s, {size / 1e6:,.0f} MB"
            text = text if _is_finished(entry) else f"({text}) {entry['status']}: {entry['reason']}"
            lines.append(f"  {entry['way']:<20}n={entry['gradients']:<5}{text}")
        for name, ratio in case["ratios"].items():
            times = f"time {shown(ratio['time'], '.3f')}, time on the CPU {shown(ratio['cpu_time'], '.3f')}"
            lines.append(f"  {REFERENCE} / {name}: {times}, memory {shown(ratio['memory'], '.3f')}, {ratio['from']}")
    return lines


def _measure(case: Case, way: str, n: int, options: HosvdOptions, device: torch.device, folder: Path) -> Entry:
    """Run one way in a process of its own, or read what an earlier, killed stage measured."""
    entry: Entry = {"way": way, "gradients": n, "status": "finished", "reason": None}
    if n not in case.ways[way]:
        return entry | {"status": "not run", "reason": "not among the numbers of gradients to measure"}
    needed, limit = peak_bytes(way, case.shape, n), SPARE * machine.free_memory(device)
    limit = limit if options.limit_bytes is None else min(limit, options.limit_bytes)
    if needed > limit:
        reason = f"needs {needed / 1e9:.1f} GB by formula, allowed here are {limit / 1e9:.1f} GB"
        return entry | {"status": "not run", "reason": reason}
    answer = _answer(folder, case, entry)
    if not answer.is_file():
        request = {"way": way, "shape": case.shape, "gradients": n, "rank": options.rank, "noise": options.noise}
        request |= {"seed": options.seed, "device": device.type, "threads": options.threads}
        trouble = _run_alone(request, answer, options.limit_seconds)
        if trouble is not None:
            return entry | {"status": "stopped", "reason": trouble}
    return entry | records.read_json(answer)


def _run_alone(request: Mapping[str, Any], answer: Path, limit_seconds: float) -> str | None:
    """Why there is no answer, if there is none.

    Raises:
        ValueError: if the request was refused.
    """
    command = [sys.executable, *WORKER, json.dumps(request), str(answer)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        return f"took longer than {limit_seconds:g} s, gradients made in that time included"
    if done.returncode < 0:
        return f"the process was ended by signal {-done.returncode}"
    if done.returncode > 0:
        raise ValueError(f"{request['way']}, {request['gradients']} gradients: {done.stderr.strip().splitlines()[-1]}")
    return None


def _answer(folder: Path, case: Case, entry: Entry, suffix: str = ".json") -> Path:
    return folder / f"{case.name}-{entry['way']}-{entry['gradients']}{suffix}"


def _calculated(case: Case, entry: Entry, found: Sequence[tuple[Case, Entry]]) -> dict[str, Any]:
    """Bytes and operations by formula, and seconds from the nearest other measurement of the same way."""
    way, n = entry["way"], entry["gradients"]
    operations, size = flop(way, case.shape, n), peak_bytes(way, case.shape, n)
    made: dict[str, Any] = {"bytes": size, "flop": sum(operations.values()), "seconds": None, "seconds_from": None}
    known = [(c, e) for c, e in found if _is_finished(e) and e["way"] == way and e is not entry]
    if known:  # of the same shape if there is one, then the one with most work
        other, source = max(known, key=lambda pair: (pair[0].name == case.name, pair[1]["gradients"]))
        theirs = flop(way, other.shape, source["gradients"])
        made["seconds"] = sum(source["seconds"][part] * operations[part] / theirs[part] for part in operations)
        made["seconds_from"] = f"{other.name}, {source['gradients']} gradients, by operations"
    if _is_finished(entry):
        made["bytes_over_measured"] = size / entry["peak_bytes"] if entry["peak_bytes"] else None
    return made


def _case_record(case: Case, entries: list[Entry], folder: Path) -> dict[str, Any]:
    index = {(entry["way"], entry["gradients"]): entry for entry in entries}
    for entry in entries:
        reference = index.get((REFERENCE, entry["gradients"]))
        if reference is None or entry["way"] == REFERENCE:
            continue
        if _is_finished(entry) and _is_finished(reference):
            ours, theirs = (load_tensors(_answer(folder, case, one, ".safetensors"))[0] for one in (entry, reference))
            entry[f"angle_to_{REFERENCE}"] = {name: angle(ours[name], theirs[name]) for name in ("U", "V")}
    facts = {"name": case.name, "shape": list(case.shape), "asked": case.asked}
    return facts | {"entries": entries, "ratios": _ratios(case, index)}


def _ratios(case: Case, index: Mapping[tuple[str, int], Entry]) -> dict[str, dict[str, Any]]:
    """Streaming over each other way, at the number of gradients asked for and where both were measured with most."""
    found = {}
    for way in (way for way in case.ways if way != REFERENCE and REFERENCE in case.ways):
        both = [n for n in case.ways[way] if all(_is_finished(index.get((one, n))) for one in (way, REFERENCE))]
        for n in sorted({case.asked, *both[-1:]}):
            ours, theirs = index[REFERENCE, n], index[way, n]
            (a, b), (c, d) = _cost(ours), _cost(theirs)
            measured = n in both
            found[f"{way}, {n} gradients"] = {
                "time": a / c if a is not None and c is not None else None,
                "cpu_time": ours["cpu_seconds"] / theirs["cpu_seconds"] if measured else None,
                "memory": b / d if d else None,
                "from": "measured" if measured else "calculated where not measured",
            }
    return found


def _is_finished(entry: Entry | None) -> bool:
    return entry is not None and entry["status"] == "finished"


def _cost(entry: Entry) -> tuple[float | None, int]:
    """Seconds and bytes, measured or calculated."""
    if _is_finished(entry):
        return entry["seconds"]["total"], entry["peak_bytes"]
    return entry["calculated"]["seconds"], entry["calculated"]["bytes"]
