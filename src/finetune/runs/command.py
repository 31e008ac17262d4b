"""What every script does around its work: its configuration, a user's error as one line, one writer a folder.

Nothing heavy is imported here, and the schema only where a configuration is checked: carried runs have neither.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any

from finetune.config.launch import is_first_process
from finetune.store import places
from finetune.store.boundary import exit_with_message
from finetune.store.files import expand_home


def script(config_name: str) -> Callable[[Callable[[dict[str, Any]], Any]], Callable[[], None]]:
    """Make a function the main of a script in ``experiments/``: Hydra composes its configuration from ``conf``.

    The function gets it as plain dictionaries, interpolations and ``~`` resolved, checked against the schema. An error
    that a user can mend, in what Hydra is told too, is one line and exit code 1.

    Args:
        config_name: the file of ``conf`` that holds where ``--config-name`` names no other.
    """

    def decorate(main: Callable[[dict[str, Any]], Any]) -> Callable[[], None]:
        import hydra
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import DictConfig, OmegaConf

        from finetune.config.check import SCRIPTS, check_script

        @hydra.main(version_base=None, config_path="../conf", config_name=config_name)
        @wraps(main)
        def composed(cfg: DictConfig) -> Any:
            with _hydra_in_one_line():
                config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            with exit_with_message():
                hydra_config, config = HydraConfig.get(), expand_home(config)
                named = Path(hydra_config.job.config_name or "").stem
                check_script(named if named in SCRIPTS else config_name, config)
                _check_names(config, hydra_config.runtime.choices, hydra_config.overrides.task)
                return main(config)

        @wraps(main)
        def run() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come here; else it would print pages
            with exit_with_message(), _hydra_in_one_line():
                composed()

        return run

    return decorate


def compose(config_name: str, overrides: Sequence[str], conf: Path) -> dict[str, Any]:
    """The configuration that a script would get, as plain dictionaries, checked.

    Args:
        config_name: a script's file of ``conf``.
        overrides: as on its command line.
        conf: the folder.

    Raises:
        SystemExit: with one line, if Hydra can't compose it.
        ValueError: if it is not what the schema allows.
    """
    import hydra
    from omegaconf import OmegaConf

    from finetune.config.check import check_script

    with _hydra_in_one_line(), hydra.initialize_config_dir(str(conf.resolve()), version_base=None):
        composed = hydra.compose(config_name, list(overrides))
        config: Any = expand_home(OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
    check_script(config_name, config)
    return config


def _check_names(config: Mapping[str, Any], choices: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse a group's file that holds another name than its own: its results would lie in the other's folder.

    Raises:
        ValueError: if there is one, and its name was not given by hand.
    """
    by_hand = {override.lstrip("+").partition("=")[0] for override in overrides}
    for group, choice in choices.items():
        found = config.get(group)
        if not isinstance(found, Mapping) or "name" not in found or f"{group}.name" in by_hand:
            continue
        own = str(choice).rpartition("/")[2].removesuffix(".yaml")
        if found["name"] != own:
            raise ValueError(f"conf/{group}/{choice}.yaml: name={found['name']!r}; allowed: that of the file, {own!r}.")


@contextmanager
def _hydra_in_one_line() -> Iterator[None]:
    """End with an error of Hydra or OmegaConf, and the names that are nearest to one that is not there."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException, RecursionError) as error:  # the last: files that include each other
        said = re.split(r"\s+(?:full_key:|Config search path:|To append to)", str(error))[0]
        text = " ".join(said.split()) or f"the configuration can't be composed ({type(error).__name__})"
        where = error if isinstance(error, OmegaConfBaseException) else error.__cause__
        there, key = getattr(where, "parent_node", None), str(getattr(where, "key", None))
        names = [str(name) for name in there] if isinstance(there, Mapping) else []
        near = [] if key in names else get_close_matches(key, names)
        raise SystemExit(f"error: {text}" + (f" (nearest: {', '.join(near)})" if near else "")) from None


@contextmanager
def only_writer(folder: Path, locks: str | Path, *others: Path, name: str | None = None) -> Iterator[None]:
    """As :func:`finetune.store.places.only_writer`; of several processes of one run the first holds it."""
    with places.only_writer(folder, locks, *others, name=name) if is_first_process() else nullcontext():
        yield


def read_lists(path: str | Path, names: Sequence[str] = ("tasks", "seeds")) -> dict[str, list[Any]]:
    """Lists of an experiment file.

    Raises:
        ValueError: if the file, or a list, is missing, empty or none of an experiment.
    """
    from finetune.store.experiment import read_checked

    content = read_checked(path)
    for name in names:
        if not content.get(name):
            raise ValueError(f"{path}: {name!r} is {content.get(name)!r}; it must be a list of at least one.")
    return {name: content[name] for name in names}


def read_workers(path: str | Path) -> Any:
    """Who does the runs of an experiment file, and how many at a time; ``auto`` where it does not say.

    Raises:
        ValueError: as :func:`read_lists`.
    """
    from finetune.store.experiment import read_checked

    return read_checked(path).get("workers", "auto")
