"""What an experiment took, from its records: seconds and peaks of each stage, model and method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.plan.throughput import Processor
from finetune.store import records

Key = tuple[str, str, str]


@dataclass
class Taken:
    """What one stage of one model and method took.

    Attributes:
        runs: finished ones.
        seconds: of all of them, start-up left out.
        steps: optimizer steps made.
        peak: bytes, the allocator's highest in training; None on a CPU.
        devices: names of cards of the plan on which they ran.
    """

    runs: int = 0
    seconds: float = 0.0
    steps: int = 0
    peak: int | None = None
    devices: set[str] = field(default_factory=set)


def taken(results: Path, experiment: str, cards: Sequence[Processor]) -> dict[Key, Taken]:
    """(stage, model, method) -> what it took; empty before anything ran.

    Of judgments no time is recorded.
    """
    place, found = results / experiment, {}
    for key, seconds, steps, record in _seconds(place):
        entry = found.setdefault(key, Taken())
        entry.runs += 1
        entry.seconds += seconds
        entry.steps += steps
        peak = (record.get("memory") or {}).get("peak_training")
        entry.peak = max(filter(None, (entry.peak, peak)), default=None)
        entry.devices |= {card.name for card in cards if card.is_named(record.get("device") or {})}
    return found


def _seconds(place: Path) -> Iterator[tuple[Key, float, int, Mapping[str, Any]]]:
    for _, record in records.iterate(place / "runs"):
        if record["status"] == "finished":
            key = ("train", record["run"]["model"], record["run"]["method"])
            yield key, record["training"]["seconds"], record["training"]["steps"], record
    for path in sorted(place.glob("search/*/*/*.json")):
        content = records.read_record(path)
        key = ("search", content["run"]["model"], content["run"]["method"])
        for trial in content["trials"]:
            steps = max((int(step) for step in trial["intermediate"]), default=0)
            yield key, trial["seconds"] or 0.0, steps, {}
    for path in sorted(place.glob("basis/*/hosvd.json")):
        for kinds in records.read_json(path).values():
            yield ("basis", path.parent.name, ""), sum(report["seconds"] for report in kinds.values()), 1, {}
    for path in sorted(place.glob("efficiency/*/*.json")):
        record = records.read_record(path)
        for variant in record["variants"]:
            rounds = variant.get("seconds") or []
            key = ("efficiency", record["run"]["model"], "")
            steps, seconds = sum(map(len, rounds)), sum(map(sum, rounds))
            yield key, seconds, steps, {"memory": variant.get("memory"), "device": record["device"]}
    for _, record in records.iterate(place / "mt_bench" / "answers"):
        yield ("answers", record["run"]["model"], record["run"]["method"]), record["seconds"], 0, record
