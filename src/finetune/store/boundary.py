"""Where an error meets the user: one line that says what to do, and an exit code."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_IN_THE_WAY = "is in the way: move it away, or choose another place"
_REMEDIES = (
    ((errno.ENOSPC, errno.EDQUOT), "make room, and run again: what is finished is kept"),
    ((errno.EACCES, errno.EPERM, errno.EROFS), "choose another place, or ask for the right to it"),
    ((errno.ENOTDIR, errno.EEXIST), f"a file {_IN_THE_WAY}"),
    ((errno.EISDIR,), f"a folder {_IN_THE_WAY}"),
)
_USERS = {"ValueError", "ImportError", "SafetensorError", "YAMLError"}


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Turn a user's error into one line on standard error and exit code 1; programming errors keep their traceback.

    A user's errors are those of input, of the system and of memory. Ctrl-C is one line and exit code 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        log.error("interrupted: what is finished is kept; run again to go on")
        raise SystemExit(130) from None
    except Exception as error:
        if (told := _told(error)) is None:
            raise
        log.debug("traceback", exc_info=True)
        raise SystemExit(f"error: {' '.join(told.split())}") from None


def _told(error: Exception) -> str | None:
    """What to say of a user's error, None of another. By names: this imports neither torch nor omegaconf."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"} or "can't allocate memory" in str(error):
        return (
            "out of memory: lower batch_size, scale.micro_batch_size, scale.evaluation_batch_size, protocol.max_length "
            "or workers, and run again: what is finished is kept"
        )
    if isinstance(error, OSError) and error.strerror:
        remedy = next((remedy for numbers, remedy in _REMEDIES if error.errno in numbers), None)
        return ": ".join(part for part in (error.filename and str(error.filename), error.strerror, remedy) if part)
    return str(error) or type(error).__name__ if names & (_USERS | {"OSError"}) else None
