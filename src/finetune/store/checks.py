"""Whether a record is what its stage wrote: asked before it is reused, and before a table takes a number from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
LOWER_IS_BETTER = frozenset({"loss"})
"""Scores of which the lowest is the best; ``loss`` is the score of a language model."""

REPORT = "report_"
"""Before the name of a metric in an evaluation: on the half of the rows that does not select."""

RUNS = ("train", "llama")
"""Kinds of records that are one training run each."""


def canonical(content: Mapping[str, Any]) -> bytes:
    """JSON that does not depend on the order of keys."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def config_hash(config: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of the sha256 of a configuration as canonical JSON."""
    return hashlib.sha256(canonical(config)).hexdigest()[:12]


def checksum(record: Mapping[str, Any]) -> str:
    """sha256 of all of a record but its own ``checksum``."""
    return hashlib.sha256(canonical({k: v for k, v in record.items() if k != "checksum"})).hexdigest()


def check_record(path: Path, record: Mapping[str, Any]) -> None:
    """Refuse a record that is not, whole and unchanged, what a run of its name wrote.

    Its checksum is that of its content; its hash is that of the identity that it holds, which says the same model,
    method, task and seed as its ``run`` and its place; a score is finite, and that of its best
    evaluation (on the reporting half, where one half selects).

    Raises:
        ValueError: saying what is wrong, and that the stage makes it anew.
    """
    try:
        fault = _fault(path, record)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        fault = f"lacks a part or holds one of another kind ({type(error).__name__}: {error})"
    if fault:
        raise ValueError(f"{path} {fault}; it is not used: its stage, run again, makes it anew.")


def _fault(path: Path, record: Mapping[str, Any]) -> str | None:
    run, schema = record["run"], record["schema"]
    if schema != SCHEMA or isinstance(schema, bool):
        return f"has schema {schema!r}, this code reads {SCHEMA}"
    if record.get("checksum") != checksum(record):
        return "is not what was written: its checksum is another"
    identity = record.get("identity")
    if identity is not None:
        if config_hash(identity) != run["config_hash"]:
            return f"holds the identity {config_hash(identity)} under the hash {run['config_hash']}"
        if identity["version"] != record["version"]:
            return f"is of version {record['version']!r}, its identity of {identity['version']!r}"
    if run["kind"] in RUNS or run["kind"] == "search":
        return _misplaced(path, record) or (_run_fault if run["kind"] in RUNS else _search_fault)(path, record)
    return None


def _misplaced(path: Path, record: Mapping[str, Any]) -> str | None:
    run, identity = record["run"], record["identity"]
    seed = record["seed"] if run["kind"] == "search" else run["seed"]
    said = {"kind": run["kind"], "seed": seed, **{k: run[k] for k in ("model", "method", "protocol", "task")}}
    held = {"kind": identity["kind"], "seed": identity["seed"]}
    held |= {name: identity[name]["name"] for name in ("model", "method", "protocol", "task")}
    for name, value in said.items():
        if value != held[name] or type(value) is not type(held[name]):
            return f"says {name} {value!r}, its identity {held[name]!r}"
    own = f"{run['task']}.json" if run["kind"] == "search" else f"{run['task']}-seed{seed}-{run['config_hash']}.json"
    place = (path.parent.parent.name, path.parent.name, path.name)
    if place != (run["model"], run["method"], own):
        return f"is a record of {run['model']}/{run['method']}/{own}"
    return None


def _run_fault(path: Path, record: Mapping[str, Any]) -> str | None:
    score, metric, held = record["score"], record["metric"], record["identity"]
    if metric != held["task"]["metric"] or record["hyperparameters"] != held["hyperparameters"]:
        return "says another metric or other hyper-parameters than its identity"
    if record["status"] == "failed":
        return None if score is None and record["error"] else "failed, but has a score or no error"
    if record["status"] != "finished" or not _is_number(score):
        return f"is {record['status']!r} with score {score!r}; a finished run has a finite score"
    evaluations = {entry["step"]: entry[metric] for entry in record["evaluations"]}
    best = (min if metric in LOWER_IS_BETTER else max)(evaluations.values())
    step = record["training"]["best_step"]
    told = next(entry for entry in record["evaluations"] if entry["step"] == step).get(REPORT + metric, best)
    if score != told or evaluations[step] != best:
        return f"has score {score!r}, the best of its evaluations is {best!r}"
    return None


def _search_fault(path: Path, record: Mapping[str, Any]) -> str | None:
    complete = [trial for trial in record["trials"] if trial["state"] == "complete"]
    won = max(complete, key=lambda t: (t["value"], -(t["validation_loss"] or 0.0), -t["number"]))
    names = ("learning_rate", "batch_size", "value")
    best = {name: won[name] for name in names} | {"trial": won["number"]}
    if record["best"] != best or not all(map(_is_number, best.values())):
        return f"has the best point {record['best']}, of its trials it is {best}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
