"""One JSON record a run: what was run, with what, and what came out. Tables are built from records and nothing else."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune.store.files import write_atomically

SCHEMA = 1
PROJECT = Path(__file__).resolve().parents[3]  # of a checkout; elsewhere it holds no pyproject.toml
PACKAGES = ("torch", "transformers", "accelerate", "peft", "optuna", "hydra-core", "datasets", "numpy", "scikit-learn")


def config_hash(config: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of the sha256 of a configuration as canonical JSON."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run the stage that writes it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run the stage that writes it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def iterate(folder: str | Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The current records below a folder: those that each cell's ``cell.json`` lists."""
    for index in sorted(Path(folder).rglob("cell.json")):
        for name in read_json(index)["records"]:
            path = index.parent / name
            yield path, read_json(path)


def provenance(root: str | Path | None = None) -> dict[str, Any]:
    """Commit, packages, Python, machine and time of this process.

    The commit is that of the project's own repository: a copy of the project inside another repository has none. The
    dirty flag looks at code and configuration alone: ``params.yaml`` is switched between experiments by design.

    Args:
        root: the project's folder, with ``pyproject.toml``; None: the one that holds this code.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    root = (PROJECT if root is None else Path(root)).resolve()
    top = _git(root, "rev-parse", "--show-toplevel") if (root / "pyproject.toml").is_file() else None
    own = top is not None and Path(top).resolve() == root
    code = ("src", "experiments/*.py", "conf")
    return {
        "commit": _git(root, "rev-parse", "HEAD") if own else None,
        "dirty": own and bool(_git(root, "status", "--porcelain", "--", *code)),
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, None outside a repository."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
