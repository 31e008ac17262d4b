"""Places that a stage writes to: one writer at a time, found unwritable before the work, swept of what a kill left."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.store.files import named

log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_KINDS = "csv|html|json|jsonl|journal|md|parquet|png|safetensors|svg|tex|txt|yaml"
_LEFT = re.compile(rf"\.(.+\.({_KINDS})\.\w+|seed\d+\.\w+|step_\d+)")
"""Names of files, of merged models and of checkpoints that are being written."""


class Busy(ValueError):
    """Another process writes there."""


@contextmanager
def only_writer(folder: Path, locks: str | Path, *others: Path, name: str | None = None) -> Iterator[None]:
    """Hold a folder, or a file in it, for this process; what a killed writer left of it is deleted.

    Args:
        folder: of the files.
        locks: folder of the lock files.
        others: folders that are held with it, and named by it.
        name: of the one file that is held, where other processes write to the folder too.

    Raises:
        Busy: if another process holds it.
        ValueError: if the file system of ``locks`` has no locks.
        OSError: if one of the folders, or ``locks``, can't be written.
    """
    with locked(folder / (name or ""), locks):
        for place in (folder, *others):
            check_writable(place, name)
            sweep(place, name)
        yield


@contextmanager
def locked(place: Path, locks: str | Path) -> Iterator[None]:
    """Hold a place for this process; the system frees it when the process ends, however it ends.

    A kill of dvc alone leaves its stage running, and the next ``dvc repro`` would start a second writer.

    Raises:
        Busy, ValueError, OSError: as :func:`only_writer`.
    """
    whole, locks = place.resolve(), Path(locks)
    path = locks / f"{whole.name}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:12]}.lock"
    locks.mkdir(parents=True, exist_ok=True)
    held = False
    while not held:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _flock(handle, place, locks)
            if held := _is(path, handle):  # else its holder has just deleted it
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _flock(handle: int, place: Path, locks: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(f"{place}: another process is working on it; wait for it, or end it.") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise ValueError(
            f"{locks} is on a file system without locks ({error.strerror}), so two writers could meet: "
            "set checkpoints=FOLDER on a local disk."
        ) from None


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def check_writable(folder: Path, name: str | None = None) -> None:
    """Write in a folder, made if missing: what stands in the way is found before the work.

    Args:
        folder: to write in.
        name: of the file that shall be there.

    Raises:
        OSError: if it can't be written, or a folder stands where the file shall be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if name is not None and (folder / name).is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / name))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise named(error, folder) from None


def sweep(folder: Path, name: str | None = None) -> None:
    """Delete what killed writers left, ``.NAME.RANDOM`` beside the NAME that it was to become; the caller holds it.

    Args:
        folder: where to look.
        name: of a file or folder in it; None: any that this project writes.
    """
    pattern = _LEFT if name is None else re.compile(rf"\.{re.escape(name)}\.\w+")
    for path in sorted(folder.glob(".*")):
        if pattern.fullmatch(path.name):
            log.info("%s: left by a killed process, deleted", path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
