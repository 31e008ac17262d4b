"""Data in several files, as the hub names them: all of ``train-00000-of-00002.parquet``, each once, or an error."""

from __future__ import annotations

import re
from collections import Counter
from glob import escape
from pathlib import Path

SHARD = re.compile(r"-(?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]{16})?")  # some exports end with a hash


def shards(folder: Path, stem: str, suffix: str = ".parquet") -> list[Path]:
    """The files ``<stem>-<number>-of-<count><suffix>`` of a folder, in order; empty if there is none.

    Raises:
        ValueError: if one is missing or there twice, if files of several exports lie side by side, or one of that
            beginning has another name.
    """
    files = sorted(folder.glob(f"{escape(stem)}-*{suffix}"))
    found = {file: SHARD.fullmatch(file.name.removeprefix(stem).removesuffix(suffix)) for file in files}
    if odd := [file.name for file, match in found.items() if match is None]:
        raise ValueError(
            f"{folder}: {', '.join(odd)}: named like no shard ({stem}-00000-of-00001{suffix}), downloaded twice "
            "perhaps: keep one export's files alone."
        )
    places = [(int(match["number"]), int(match["count"])) for match in found.values() if match]
    totals = sorted({count for _, count in places})
    if len(totals) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder}: {names}: files of several exports ({totals} shards) side by side; keep one's.")
    numbers = Counter(number for number, _ in places)
    wanted = set(range(totals[0])) if totals else set()
    if wrong := sorted(wanted ^ set(numbers)) or [number for number, times in numbers.items() if times > 1]:
        raise ValueError(
            f"{folder} has {', '.join(file.name for file in files)}; each shard 0 to {totals[0] - 1} is needed once, "
            f"wrong: {wrong[:5]}; fetch the export again."
        )
    return files
