"""Files of lines that only grow: what was written stays, through a kill and through a full disk."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from finetune.store.files import named

log = logging.getLogger(__name__)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, with their ends; what a kill left of a last one is none. Empty without a file."""
    content = path.read_bytes() if path.exists() else b""
    return [line for line in io.BytesIO(content) if line.endswith(b"\n")]


def cut(path: Path, lines: Sequence[bytes]) -> None:
    """Take off what follows these first lines of a file, and say so in the log."""
    size = sum(map(len, lines))
    if path.exists() and size < path.stat().st_size:
        log.warning("%s: line %d is torn; it is taken off, and its work is done again", path, len(lines) + 1)
        os.truncate(path, size)


def append_line(path: Path, line: bytes) -> None:
    """Write a line: it is on the disk, whole, when this returns; the file is as before if it raises.

    Raises:
        OSError: if it can't be written (a full disk).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(handle).st_size
        try:
            rest = memoryview(line)
            while rest:  # the system may take a part, as when the disk has room for no more
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(handle, before)
            raise
    except OSError as error:
        raise named(error, path) from error
    finally:
        os.close(handle)
