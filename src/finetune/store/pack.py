"""Pack what an experiment's stages wrote, without weights, into one archive that :mod:`finetune.store.unpack` takes.

    python -m finetune.store.pack experiments/hour.yaml outputs/hour.tar.xz
    python -m finetune.store.pack carried outputs/hour.tar.xz    # a folder of finetune.runs.carry, on a bare machine

The second form needs the standard library and PyYAML alone.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from finetune.store.archive import collect, write_archive
from finetune.store.boundary import exit_with_message
from finetune.store.records import provenance, read_json

log = logging.getLogger("finetune.store.pack")

CARRIED = "carried.json"
"""In a carried folder: what it holds, and of which experiment, configuration, version and commit."""


def pack(source: Path, archive: Path, root: Path = Path("results")) -> None:
    """Pack an experiment's results.

    Args:
        source: a file of ``experiments/``, or a carried folder.
        archive: file to write, a ``tar.xz``.
        root: where the experiment's results lie; of a carried folder they are its own.

    Raises:
        ValueError: if there is nothing to pack, a record is not sound, or the archive were too large.
    """
    if source.is_dir():
        origin, root = carried_origin(source), source / "results"
    else:
        from finetune.store.origin import origin_of

        origin = origin_of(source)
    results = root / origin["experiment"]
    files = collect(results, origin)
    size = write_archive(archive, origin, files)
    log.info("%s: %d files of %s, %.1f MB", archive, len(files), results, size / 1e6)


def carried_origin(folder: Path) -> dict[str, Any]:
    """What a carried folder is of; with this checkout's commit, where the code that ran is one.

    Raises:
        ValueError: if it is no carried folder.
    """
    origin, code = dict(read_json(folder / CARRIED)["origin"]), provenance()
    if code["commit"] is not None:
        origin |= {"commit": code["commit"], "dirty": code["dirty"]}
    return origin


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with exit_with_message():
        pack(*map(Path, sys.argv[1:3]))
