"""What every script does around its work: its configuration, a user's error as one line, one writer a folder.

Nothing heavy is imported here.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any

from finetune.config.check import SCRIPTS, check_script
from finetune.config.launch import is_first_process
from finetune.store import places
from finetune.store.files import read_yaml

log = logging.getLogger(__name__)

_IN_THE_WAY = "is in the way: move it away, or choose another place"
_REMEDIES = (
    ((errno.ENOSPC, errno.EDQUOT), "make room, and run again: what is finished is kept"),
    ((errno.EACCES, errno.EPERM, errno.EROFS), "choose another place, or ask for the right to it"),
    ((errno.ENOTDIR, errno.EEXIST), f"a file {_IN_THE_WAY}"),
    ((errno.EISDIR,), f"a folder {_IN_THE_WAY}"),
)
_USERS = {"ValueError", "ImportError", "SafetensorError", "YAMLError"}


def script(config_name: str) -> Callable[[Callable[[dict[str, Any]], Any]], Callable[[], None]]:
    """Make a function the main of a script in ``experiments/``: Hydra composes its configuration from ``conf``.

    The function gets it as plain dictionaries, interpolations resolved, checked against the schema. An error that a
    user can mend, in what Hydra is told too, is one line and exit code 1.

    Args:
        config_name: the file of ``conf`` that holds where ``--config-name`` names no other.
    """

    def decorate(main: Callable[[dict[str, Any]], Any]) -> Callable[[], None]:
        import hydra
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import DictConfig, OmegaConf

        @hydra.main(version_base=None, config_path="../conf", config_name=config_name)
        @wraps(main)
        def composed(cfg: DictConfig) -> Any:
            with _hydra_in_one_line():
                config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            with exit_with_message():
                named = Path(HydraConfig.get().job.config_name or "").stem
                check_script(named if named in SCRIPTS else config_name, config)
                return main(config)

        @wraps(main)
        def run() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come here; else it would print pages
            with exit_with_message(), _hydra_in_one_line():
                composed()

        return run

    return decorate


@contextmanager
def _hydra_in_one_line() -> Iterator[None]:
    """End with an error of Hydra or OmegaConf, and the names that are nearest to one that is not there."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(re.split(r"\s+(?:full_key:|Config search path:|To append to)", str(error))[0].split())
        where = error if isinstance(error, OmegaConfBaseException) else error.__cause__
        there, key = getattr(where, "parent_node", None), str(getattr(where, "key", None))
        names = [str(name) for name in there] if isinstance(there, Mapping) else []
        near = [] if key in names else get_close_matches(key, names)
        raise SystemExit(f"error: {text}" + (f" (nearest: {', '.join(near)})" if near else "")) from None


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


@contextmanager
def only_writer(folder: Path, locks: str | Path, *others: Path, name: str | None = None) -> Iterator[None]:
    """As :func:`finetune.store.places.only_writer`; of several processes of one run the first holds it."""
    with places.only_writer(folder, locks, *others, name=name) if is_first_process() else nullcontext():
        yield


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
