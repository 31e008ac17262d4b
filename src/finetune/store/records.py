"""One JSON record a run: what was run, with what, and what came out. Tables are built from records and nothing else."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune.store.checks import SCHEMA, check_record, checksum, config_hash
from finetune.store.files import write_atomically

__all__ = ["SCHEMA", "check_record", "checksum", "config_hash", "iterate", "listed_records", "provenance", "read_json"]
__all__ += ["read_record", "reusable", "write_json", "write_record"]

log = logging.getLogger(__name__)
PROJECT = Path(__file__).resolve().parents[3]  # of a checkout; elsewhere it holds no pyproject.toml
PACKAGES = ("torch", "transformers", "accelerate", "peft", "optuna", "hydra-core", "datasets", "numpy", "scikit-learn")

# With these, which a hook of git sets, git would speak of another repository.
_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE")


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that the file is there whole or not at all.

    Raises:
        ValueError: if the content holds NaN or infinity, which JSON has not.
    """
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run the stage that writes it.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged, or no JSON ({error}): move it away and run the stage that writes it again."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record with its checksum, as `write_json`."""
    write_json(path, {**record, "checksum": checksum(record)})


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: as `read_json`, or if it is not what its stage wrote (`finetune.store.checks.check_record`).
    """
    record = read_json(path)
    check_record(Path(path), record)
    return record


def reusable(path: str | Path, digest: str) -> dict[str, Any] | None:
    """A record that need not be made again; None if there is none of this hash, or it is not sound, which is said."""
    if not Path(path).is_file():
        return None
    try:
        record = read_record(path)
    except ValueError as error:
        log.warning("%s", error)
        return None
    return record if record["run"]["config_hash"] == digest else None


def iterate(folder: str | Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The current records below a folder: those that each cell's ``cell.json`` lists.

    Raises:
        ValueError: as `read_record`; if a list names something else, or lacks a run that lies beside it.
    """
    for index in sorted(Path(folder).rglob("cell.json")):
        listed = listed_records(index)
        there = {path.name for path in index.parent.glob("*-seed*-*.json")}
        if odd := sorted(there - {*listed}):
            raise ValueError(f"{index} lacks {odd[0]}, which lies beside it; its stage, run again, settles it.")
        for name in listed:
            yield index.parent / name, read_record(index.parent / name)


def listed_records(index: Path) -> list[str]:
    """The file names that a ``cell.json`` lists.

    Raises:
        ValueError: as `read_json`, or if they are no file names, or one is there twice.
    """
    listed = read_json(index).get("records")
    if not isinstance(listed, list) or not all(isinstance(one, str) and Path(one).name == one for one in listed):
        raise ValueError(f"{index} lists no records: run the stage that writes it again.")
    if len(listed) != len({*listed}):
        raise ValueError(f"{index} lists a record twice: run the stage that writes it again.")
    return listed


def provenance(root: str | Path | None = None, *, commit: str | None = None) -> dict[str, Any]:
    """Commit, packages, Python, machine and time of this process.

    The commit is that of the project's own repository: a copy of the project inside another repository has none, nor
    has one that git refuses to read because it is another user's; nobody knows then whether it is dirty (None). The
    dirty flag looks at code and configuration alone: ``params.yaml`` is switched between experiments by design.

    Args:
        root: the project's folder, with ``pyproject.toml``; None: the one that holds this code.
        commit: what whoever made a copy without a repository says that it is of; a repository's own wins.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    root = (PROJECT if root is None else Path(root)).resolve()
    top = git(root, "rev-parse", "--show-toplevel") if (root / "pyproject.toml").is_file() else None
    own = top is not None and Path(top).resolve() == root
    status = git(root, "status", "--porcelain", "--", "src", "experiments/*.py", "conf") if own else None
    return {
        "commit": git(root, "rev-parse", "HEAD") if own else commit,
        "dirty": None if status is None else bool(status),
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, None outside a repository."""
    environment = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
