"""Take an archive of :mod:`finetune.store.pack` into ``results``: all that is sound and new, or nothing.

    python -m finetune.store.unpack hour.tar.xz [COMMIT]

Files are written one by one, each whole, a cell's list last: a kill leaves less, and a second call goes on. What is
complete then is done for DVC too (``dvc commit``); ``dvc repro`` does the rest.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from finetune.config.names import is_name
from finetune.store import places
from finetune.store.archive import check, is_list, read_archive, run_of
from finetune.store.boundary import exit_with_message
from finetune.store.checks import check_record
from finetune.store.dvc_stages import commit_complete
from finetune.store.experiment import load, write_params
from finetune.store.files import write_atomically
from finetune.store.origin import check_origin, origin_of
from finetune.store.records import listed_records, write_json

log = logging.getLogger("finetune.store.unpack")


def unpack(archive: Path, accepted: str | None = None) -> Path:
    """Take an archive into the results of this checkout.

    Args:
        archive: of :func:`finetune.store.pack.pack`.
        accepted: beginning of another commit that counts as this one.

    Returns:
        The experiment's file.

    Raises:
        ValueError: if it is not whole, of another configuration, version or commit; if a finished record here is
            another; if a stage is writing there.
    """
    origin, files = read_archive(archive)
    source = Path("experiments") / f"{origin['file']}.yaml"
    if not is_name(origin["file"]) or not source.is_file():
        raise ValueError(f"{archive} is of experiment {origin['file']!r}; there is no {source} here.")
    check_origin(archive, origin, here := origin_of(source), accepted)
    results = Path("results") / here["experiment"]
    check(results, files, here)
    with ExitStack() as held:
        for place in sorted({_place(results, name) for name in files}):
            held.enter_context(places.locked(place, places.LOCKS))
        taken = [name for name in files if not is_list(name) and _is_taken(archive, results, name, files)]
        for name in taken:
            write_atomically(results / name, files[name])
        for folder in sorted({PurePosixPath(name).parent for name in files}):
            taken += _list(results, folder, files)
    log.info("%s: %d of %d files taken, the others were here", archive, len(taken), len(files))
    return source


def _place(results: Path, name: str) -> Path:
    """What the writer of a file holds: a run's cell, a folder, or one file that lies for itself."""
    top, *below = PurePosixPath(name).parts
    if not below:
        return results / top
    return results.joinpath("runs" if top == "search" else top, *below[:-1])


def _is_taken(archive: Path, results: Path, name: str, files: Mapping[str, bytes]) -> bool:
    """Whether a file is written: it is new, goes on with a journal, or its record is finished and that here is not.

    Raises:
        ValueError: if the record here is finished and another, or two journals part.
    """
    path, content = results / name, files[name]
    if not path.is_file():
        if other := _rival(results, name):
            raise _another(archive, other, name)
        return True
    here = path.read_bytes()
    if here == content:
        return False
    owner = _record_of(name)
    done_here, done_there = _is_finished(results, owner), _is_finished(results, owner, files.get(owner, b""))
    if done_here != done_there:
        return done_there
    if done_here or (path.suffix in (".journal", ".grid", ".jsonl") and not _begins(here, content)):
        raise _another(archive, path, name)
    return len(content) > len(here) and _begins(here, content)


def _begins(one: bytes, other: bytes) -> bool:
    return one.startswith(other) or other.startswith(one)


def _another(archive: Path, path: Path, name: str) -> ValueError:
    return ValueError(
        f"{path} is here, and {archive} holds another {name}: nothing is taken; move that away which shall not count."
    )


def _rival(results: Path, name: str) -> Path | None:
    """A finished record here of the same run under another hash: of other data, weights or bases."""
    run = run_of(name)
    found = sorted(results.glob(f"{run}-*.json")) if run else []
    return next((path for path in found if _is_finished(results, path.relative_to(results).as_posix())), None)


def _record_of(name: str) -> str:
    """The record that vouches for a file beside it; of a record itself."""
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem.removesuffix('.failures')}.json"))


def _is_finished(results: Path, name: str, content: bytes | None = None) -> bool:
    """Whether a record is sound and its run did not fail."""
    path = results / name
    try:
        record = json.loads(path.read_bytes() if content is None else content)
        check_record(path, record)
    except (OSError, ValueError):
        return False
    return record.get("status", "finished") == "finished"


def _list(results: Path, folder: PurePosixPath, files: Mapping[str, bytes]) -> list[str]:
    """Let a cell's list name what is here and what was taken; a cell without one is not done yet, here and there.

    Returns:
        The list's name, if it was written.
    """
    index, packed = results / folder / "cell.json", files.get(f"{folder}/cell.json")
    there = json.loads(packed)["records"] if packed else []
    here = listed_records(index) if index.is_file() else []
    if not there and not here:
        return []
    new = [path.name for path in map(PurePosixPath, files) if path.parent == folder and path.suffix == ".json"]
    names = dict.fromkeys(name for name in [*there, *here, *new] if name != "cell.json")
    listed = [name for name in names if (index.parent / name).is_file()]
    if listed == here:
        return []
    write_json(index, {"records": listed})
    return [str(folder / "cell.json")]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with exit_with_message():
        source = unpack(Path(sys.argv[1]), *sys.argv[2:3])
        write_params(source, "params.yaml")
        commit_complete(load(source))
