"""What every script does around its work: a user's error as one line, lists of an experiment file, one writer a folder.

Nothing heavy is imported here.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.store.files import read_yaml

log = logging.getLogger(__name__)


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Turn a user's error into one line on standard error and exit code 1; programming errors keep their traceback."""
    try:
        yield
    except (ValueError, ImportError) as error:
        log.debug("traceback", exc_info=True)
        raise SystemExit(f"error: {error}") from None


@contextmanager
def only_writer(folder: Path, locks: str | Path) -> Iterator[None]:
    """Hold a cell's folder for this process; the system frees it when the process ends, however it ends.

    A kill of dvc alone leaves its stage running, and the next ``dvc repro`` would start a second writer. Of several
    processes of one run the first holds it.

    Raises:
        ValueError: if another process holds it.
    """
    if not is_first_process():
        yield
        return
    path = Path(locks) / f"{folder.as_posix().strip('/').replace('/', '-')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is working on this cell; wait for it, or end it.") from None
        yield


def is_first_process() -> bool:
    """Whether this is the process that writes, of those that ``accelerate launch`` or ``torchrun`` started."""
    return int(os.environ.get("RANK", "0")) == 0


def read_lists(path: str | Path, names: Sequence[str] = ("tasks", "seeds")) -> dict[str, list[Any]]:
    """Lists of an experiment file.

    Raises:
        ValueError: if the file, or a list, is missing or empty.
    """
    content = read_yaml(Path(path))
    for name in names:
        if not isinstance(content.get(name), list) or not content[name]:
            raise ValueError(f"{path}: {name!r} is {content.get(name)!r}; it must be a list of at least one.")
    return {name: content[name] for name in names}
