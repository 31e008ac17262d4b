"""Files that are there whole or not at all, and YAML files with one clear error."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

log = logging.getLogger(__name__)

_KINDS = "csv|html|json|jsonl|journal|md|parquet|png|safetensors|sha256|svg|tex|txt|yaml"
_RANDOM = r"\.(?!s[a-z]{2}$)\w+"  # of tempfile; an editor's swap file, .NAME.swp, is a user's
_LEFT = re.compile(rf"\.((.+\.({_KINDS})|seed\d+){_RANDOM}|step_\d+)")
"""Names of files, of merged models and of checkpoints that are being written."""


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write beside the target, sync, and swap: a kill leaves the old file or the new one, never a part.

    Missing parent folders are made; text is written as UTF-8; what killed writers left of the file is deleted.

    Raises:
        OSError: if it can't be written; it names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
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


def write_text(path: str | Path, content: str) -> None:
    """Write a text, and beside it its checksum as ``sha256sum -c`` reads it; see :func:`read_text`."""
    path = Path(path)
    write_atomically(path, content)
    write_atomically(path.with_name(f"{path.name}.sha256"), f"{sha256(path)}  {path.name}\n")


def read_text(path: str | Path) -> str:
    """A text that the generate stage wrote, or one of a user's own, which has no checksum beside it.

    Raises:
        ValueError: if it is missing, no UTF-8, or not what was written.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; the generate stage writes it.")
    sums = path.with_name(f"{path.name}.sha256")
    if sums.is_file() and sums.read_bytes().split()[:1] != [sha256(path).encode()]:
        raise ValueError(f"{path} is not what {sums.name} was written for: run the generate stage again.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): run the generate stage again.") from None


@contextmanager
def folder_atomically(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``folder`` at the end: it is there whole or not at all.

    Raises:
        OSError: if it can't be written; what was there stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent, folder.name)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sweep(folder: Path, name: str | None = None) -> None:
    """Delete what killed writers left, ``.NAME.RANDOM`` beside the NAME that it was to become; the caller holds it.

    Args:
        folder: where to look.
        name: of one file or folder in it; None: any that this project writes, and below it too.
    """
    pattern = _LEFT if name is None else re.compile(rf"\.{re.escape(name)}{_RANDOM}")
    for path in sorted(folder.glob(".*") if name else folder.rglob(".*")):
        if pattern.fullmatch(path.name):
            log.info("%s: left by a killed process, deleted", path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)  # it went with its folder


def named(error: OSError, path: Path) -> OSError:
    """The system's refusal, with the file that it is about."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def expand_home(value: Any) -> Any:
    """A configuration with every ``~/...`` and ``~user/...`` in it, at any depth, as the home folder it stands for.

    Raises:
        ValueError: if there is no such user.
    """
    if isinstance(value, Mapping):
        return {key: expand_home(found) for key, found in value.items()}
    if isinstance(value, list):
        return [expand_home(found) for found in value]
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    found = os.path.expanduser(value)
    if found.startswith("~") and "/" in found:
        raise ValueError(f"{value!r}: there is no home folder of that name; give the whole path.")
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        ValueError: if there is no such file, it is no YAML mapping, or one names a key twice.
    """
    if not path.is_file():
        there = ", ".join(sorted(found.name for found in path.parent.glob("*.yaml"))) or "no YAML file"
        raise ValueError(f"there is no {path}; its folder has {there}.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, no mapping.")
    return content


class _Loader(yaml.SafeLoader):
    """As Hydra reads the same files: 1e-3 is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]!r} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)
