"""Places that a stage writes to: one writer at a time, found unwritable before the work, swept of what a kill left."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.store.files import named, sweep

LOCKS = "outputs/checkpoints"
"""Folder of the locks of stages, as ``checkpoints`` of ``conf/base.yaml``, and of scripts without checkpoints."""

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Busy(ValueError):
    """Another process writes there."""


@contextmanager
def only_writer(folder: Path, locks: str | Path, *others: Path, name: str | None = None) -> Iterator[None]:
    """Hold a folder, or one thing in it, for this process; what a killed writer left of it is deleted.

    Args:
        folder: with all below it.
        locks: folder of the lock files.
        others: folders that are held with it, and named by it.
        name: of the file, with its suffix, or the folder that is held, where other processes write beside it.

    Raises:
        Busy: if another process holds it.
        ValueError: if the file system of ``locks`` has no locks.
        OSError: if one of the folders, or ``locks``, can't be written.
    """
    with locked(folder / (name or ""), locks):
        for place in (folder, *others):
            check_writable(place, name if name and Path(name).suffix else None)
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
