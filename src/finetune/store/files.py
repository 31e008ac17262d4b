"""Files that are there whole or not at all, and YAML files with one clear error."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write beside the target, sync, and swap: a kill leaves the old file or the new one, never a part.

    Missing parent folders are made; text is written as UTF-8.

    Raises:
        OSError: if it can't be written; it names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep group members out
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise named(error, path) from error
        raise


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def named(error: OSError, path: Path) -> OSError:
    """The system's refusal, with the file that it is about."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        ValueError: if there is no such file, or it is no YAML mapping.
    """
    if not path.is_file():
        there = ", ".join(sorted(found.name for found in path.parent.glob("*.yaml"))) or "no YAML file"
        raise ValueError(f"there is no {path}; its folder has {there}.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, no mapping.")
    return content
