"""What the records say besides scores: environment, models and data, failures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.mt_bench.judged import current_records
from finetune.report.page.markup import Child, Html, grid, join, tag
from finetune.store import records

_NOT_RECORDS = ("chat", "data", "figures", "gradients", "tables")
"""Folders of an experiment without records of runs."""

KINDS = {
    "search": "search",
    "train": "GLUE training",
    "llama": "decoder training",
    "answers": "answers",
    "judgments": "judgments",
    "efficiency": "speed and memory",
}
"""Kind of a record -> its name on the page, in the order of the page."""


@dataclass(frozen=True)
class Found:
    """A record and where it lies."""

    path: str
    content: Mapping[str, Any]

    @property
    def run(self) -> Mapping[str, Any]:
        """What was run; empty for a file that is no run's."""
        return self.content.get("run", {})

    @property
    def kind(self) -> str:
        """Kind of run."""
        return self.run.get("kind", "")


def read_found(results: str | Path) -> list[Found]:
    """Read the current records below an experiment's folder: those with a provenance.

    Raises:
        ValueError: If a file is damaged.
    """
    return list(_read(Path(results)))


def environment_html(found: Sequence[Found]) -> Html:
    """Commits, packages, machines, models and data of all records."""
    parts = [_commits(found), _versions(found), _artefacts(found)]
    return join([part for part in parts if part], "\n")


def failures(found: Sequence[Found]) -> list[str]:
    """A sentence for each failed run."""
    return [
        f"{one.path}: failed ({str(one.content.get('error') or 'no error kept')[:200]})"
        for one in found
        if one.content.get("status") == "failed"
    ]


def _read(results: Path) -> Iterator[Found]:
    if not results.is_dir():
        raise ValueError(f"{results} does not exist: run the experiment's stages first.")
    folders = sorted(path for path in results.iterdir() if path.is_dir() and path.name not in _NOT_RECORDS)
    for path in (*(path for folder in folders for path in current_records(folder)), *sorted(results.glob("*.json"))):
        if "models" in path.relative_to(results).parts[:2]:
            continue
        content = records.read_json(path)
        if "provenance" in content:
            yield Found(path.as_posix(), content)


def _commits(found: Sequence[Found]) -> Html:
    groups: dict[tuple[str, bool], list[Found]] = {}
    for one in found:
        provenance = one.content["provenance"]
        groups.setdefault((provenance.get("commit") or "no repository", bool(provenance.get("dirty"))), []).append(one)
    rows = [
        [
            tag("code", commit[:12]),
            tag("b", "yes") if dirty else "no",
            str(len(members)),
            ", ".join(sorted({_kind(member) for member in members})),
        ]
        for (commit, dirty), members in groups.items()
    ]
    head = ["commit", "uncommitted changes", "records", "of"]
    return grid(head, rows, "Code behind the records")


def _versions(found: Sequence[Found]) -> Html:
    """Every version that occurs, with the number of records where there is more than one."""
    values: dict[str, dict[str, int]] = {}
    for one in found:
        provenance = one.content["provenance"]
        given = {"Python": provenance.get("python"), "platform": provenance.get("platform")}
        given |= provenance.get("packages") or {}
        device = one.content.get("device")
        if device:
            name = f"{device.get('type')}, {device.get('name')}"
            given["device"] = f"{name}, {device['threads']} threads" if "threads" in device else name
        for key, value in given.items():
            counts = values.setdefault(key, {})
            counts[value or "not installed"] = counts.get(value or "not installed", 0) + 1
    rows = []
    for key, counts in values.items():
        several = len(counts) > 1
        rows.append([key, "; ".join(f"{value} ({n} records)" if several else value for value, n in counts.items())])
    return grid(["what", "version"], rows, "Versions and machines")


def _artefacts(found: Sequence[Found]) -> Html | None:
    """Models and data by name, revision and hash."""
    rows: dict[str, list[Child]] = {}
    for one in found:
        model, data = one.content.get("model"), one.content.get("data")
        if one.kind not in ("train", "llama") or not isinstance(model, Mapping) or not isinstance(data, Mapping):
            continue
        origin = model.get("checkpoint") or "a local folder"
        weights = "random weights" if model.get("random_weights") else f"sha256 {str(model.get('sha256'))[:12]}"
        rows[f"model {model.get('title')}"] = [origin, str(model.get("revision") or "none")[:12], weights]
        sums = ", ".join(f"{name} {str(value)[:12]}" for name, value in data.get("sha256", {}).items())
        sizes = ", ".join(f"{count:,} {name}" for name, count in data.get("rows", {}).items())
        rows[f"data {data.get('task')}"] = [f"{sizes} rows", "by content", f"sha256 {sums}"]
    if not rows:
        return None
    lines = [[name, *cells] for name, cells in sorted(rows.items(), reverse=True)]
    return grid(["what", "from", "revision", "content"], lines, "Models and data")


def _kind(one: Found) -> str:
    """What a record is of, for readers; one without a kind is named by its folder."""
    return KINDS.get(one.kind) or (one.kind or Path(one.path).parent.name).replace("_", " ")
