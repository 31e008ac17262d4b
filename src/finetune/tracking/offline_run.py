"""What stands in the file of an offline wandb run: history, configuration, summary, artefacts, read back.

A ``.wandb`` file is LevelDB's log (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind a header of
7 bytes: blocks of 32,768 bytes with chunks ``crc32 (4) | length (2) | type (1) | data``, little-endian, whose joined
data are wandb's ``Record`` messages. wandb 0.31 has no reader of its own in Python. Records come in the order in
which they were written; of a file that a kill cut short, all whole ones are read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER = b":W&B"
_BLOCK, _HEAD, _START = 32768, 7, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """An offline run as its file holds it.

    Attributes:
        run: ``id``, ``project``, ``group``, ``job_type`` and ``name``.
        config: as given to ``wandb.init``.
        history: one dictionary a logged step, with ``step``; wandb's own entries (``_runtime``, ...) left out.
        summary: final values; those that wandb copies from the last history row among them.
        artifacts: ``name``, ``type``, ``metadata`` and ``files`` (paths inside it) of each that was logged.
        system: samples of system metrics, name to value.
        exit_code: of the run; None where it did not end.
    """

    run: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    system: list[dict[str, float]] = field(default_factory=list)
    exit_code: int | None = None


def read_offline_run(path: str | Path) -> OfflineRun:
    """Read a ``run-<id>.wandb`` file.

    Raises:
        ValueError: if the file is no such file; an empty one is a run that has just begun.
        ImportError: if wandb is not installed; its message types are needed.
    """
    from wandb.proto import wandb_internal_pb2

    found = OfflineRun()
    for content in _contents(Path(path)):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind in _READERS:
            _READERS[kind](found, getattr(record, kind))
    return found


def offline_files(folder: str | Path) -> dict[str, list[Path]]:
    """Run id -> its offline files below a folder, oldest first."""
    found: dict[str, list[Path]] = {}
    for path in sorted(Path(folder).rglob("offline-run-*/run-*.wandb")):
        found.setdefault(path.stem.removeprefix("run-"), []).append(path)
    return found


def _contents(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    if not HEADER.startswith(data[: len(HEADER)]):
        raise ValueError(f"{path} is no file of an offline wandb run: it starts with {data[:4]!r}, not {HEADER!r}.")
    place, parts = _START, b""
    while place + _HEAD <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEAD:
            place += left  # what is too short for a chunk's head is padding
            continue
        crc, length, kind = (int.from_bytes(data[place + a : place + b], "little") for a, b in ((0, 4), (4, 6), (6, 7)))
        chunk = data[place + _HEAD : place + _HEAD + length]
        if len(chunk) < length or not _is_whole(crc, kind, chunk):
            return  # the tail of a run that was killed
        place += _HEAD + length
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        if kind in (_FULL, _LAST):
            yield parts


def _is_whole(crc: int, kind: int, chunk: bytes) -> bool:
    """wandb's checksum is zlib's crc32 of type and data, where LevelDB's is a masked crc32c."""
    return kind in (_FULL, _FIRST, _MIDDLE, _LAST) and crc == zlib.crc32(chunk, zlib.crc32(bytes([kind])))


def _run(found: OfflineRun, record: Any) -> None:
    names = {"id": "run_id", "project": "project", "group": "run_group", "job_type": "job_type", "name": "display_name"}
    found.run |= {name: getattr(record, attribute) for name, attribute in names.items()}
    _config(found, record.config)


def _config(found: OfflineRun, record: Any) -> None:
    for item in record.update:
        if item.key != "_wandb":
            found.config[item.key] = json.loads(item.value_json)


def _history(found: OfflineRun, record: Any) -> None:
    row = _nested(record.item)
    step = row.pop("_step", record.step.num)
    found.history.append({"step": step} | {k: v for k, v in row.items() if not k.startswith("_")})


def _summary(found: OfflineRun, record: Any) -> None:
    found.summary |= {k: v for k, v in _nested(record.update).items() if not k.startswith("_")}


def _nested(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *above, last = item.nested_key or [item.key]
        place = found
        for name in above:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
    return found


def _artifact(found: OfflineRun, record: Any) -> None:
    files = sorted(entry.path for entry in record.manifest.contents)
    metadata = json.loads(record.metadata) if record.metadata else {}
    found.artifacts.append({"name": record.name, "type": record.type, "metadata": metadata, "files": files})


def _stats(found: OfflineRun, record: Any) -> None:
    found.system.append({item.key: float(json.loads(item.value_json)) for item in record.item})


def _exit(found: OfflineRun, record: Any) -> None:
    found.exit_code = record.exit_code


_READERS = {
    "run": _run,
    "config": _config,
    "history": _history,
    "summary": _summary,
    "artifact": _artifact,
    "stats": _stats,
    "exit": _exit,
}
