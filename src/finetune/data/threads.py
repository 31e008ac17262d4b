"""OpenAssistant's messages from a local folder or the hub, checked, and the threads of their trees."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pyarrow as pa

from finetune.data.tables import read_files, read_hub
from finetune.store.shards import shards

ROLES = ("prompter", "assistant")
COLUMNS = ("message_id", "parent_id", "text", "role", "message_tree_id")

Message = dict[str, Any]
Thread = tuple[str, ...]


@dataclass(frozen=True)
class Messages:
    """The messages of a split, in the order of their files.

    Attributes:
        rows: one dictionary a message, with the columns that the options need.
        sha256: of the files, or the hub's name and revision.
    """

    rows: list[Message]
    sha256: str


def read_messages(data: Mapping[str, Any]) -> dict[str, Messages]:
    """The messages of the splits ``train`` and ``validation``; no tree is in both.

    A folder ``<root>/<folder>`` holds ``data/train-*.parquet`` and ``data/validation-*.parquet`` (the hub's layout),
    the same without ``data/``, or one ``messages.parquet``, whose trees are split by a hash of their id. Without the
    folder the hub is asked.

    Raises:
        ValueError: if nothing can be read, columns are missing, ids repeat, roles are unknown, or splits share a tree.
    """
    folder = Path(data["root"]) / data["folder"]
    if (folder / "messages.parquet").is_file():
        whole = folder / "messages.parquet"
        if beside := sorted({*folder.glob("*.parquet"), *folder.glob("data/*.parquet")} - {whole}):
            raise ValueError(f"{whole} has {', '.join(file.name for file in beside)} beside it; keep one of the two.")
        rows, digest = _read([whole], data)
        found = {name: Messages(part, digest) for name, part in _split(rows, data["validation_share"]).items()}
    elif folder.is_dir():
        found = {name: Messages(*_read(_files(folder, name), data)) for name in ("train", "validation")}
    else:
        tables = {name: read_hub(data, name, folder) for name in ("train", "validation")}
        found = {name: Messages(_rows(table, data, label), label) for name, (table, label) in tables.items()}
    trees = [{row["message_tree_id"] for row in split.rows} for split in found.values()]
    if shared := sorted(set.intersection(*trees)):
        raise ValueError(
            f"{folder}: {len(shared)} trees are in both splits, such as {shared[0]}; use files of one source."
        )
    for name, split in found.items():
        if not split.rows:
            raise ValueError(f"{folder}: the {name} split has no messages; chat.validation_share decides its trees.")
    return found


def threads_of(rows: Sequence[Message], data: Mapping[str, Any]) -> tuple[list[Thread], dict[str, int]]:
    """The dialogues of a split: user, assistant, ..., assistant, without outer white space.

    Returns:
        The threads, in the order of the files, and how many messages and threads were found and left out, and why:
        ``orphaned_messages`` are those below one that is missing or left out; ``threads`` counts root-to-leaf paths;
        ``cut_prompts`` those whose last message asked and was not answered, of which ``repeated_threads`` then equal
        another and ``unanswered_threads`` have no answer at all.

    Raises:
        ValueError: if messages are each other's ancestors.
    """
    facts = Counter(
        messages=len(rows), trees=len({row["message_tree_id"] for row in rows}),
        filtered_messages=0, empty_messages=0, orphaned_messages=0, threads=0, misordered_threads=0,
        cut_prompts=0, unanswered_threads=0, repeated_threads=0,
    )  # fmt: skip
    _parents_first(rows)
    kept = []
    for row in rows:
        reason = _reason_to_drop(row, data)
        if reason:
            facts[reason] += 1
        else:
            kept.append(row)
    attached = _attached(kept)
    facts["orphaned_messages"] = len(kept) - len(attached)
    threads: dict[Thread, None] = {}  # a dictionary, for its order
    for path in _paths(attached, data["threads"] == "best"):
        facts["threads"] += 1
        if any(row["role"] != ROLES[place % 2] for place, row in enumerate(path)):
            facts["misordered_threads"] += 1
            continue
        if len(path) % 2:
            facts["cut_prompts"] += 1
            path = path[:-1]
        thread = tuple(row["text"].strip() for row in path)
        if not thread:
            facts["unanswered_threads"] += 1
        elif thread in threads:
            facts["repeated_threads"] += 1
        threads.setdefault(thread)
    threads.pop((), None)
    return list(threads), dict(facts)


def _reason_to_drop(row: Message, data: Mapping[str, Any]) -> str | None:
    other_language = data["languages"] is not None and row["lang"] not in data["languages"]
    deleted = data["deleted"] == "drop" and row["deleted"]
    if other_language or deleted or (data["review"] == "passed" and not row["review_result"]):
        return "filtered_messages"
    return None if (row["text"] or "").strip() else "empty_messages"


def _paths(rows: Sequence[Message], best: bool) -> Iterator[tuple[Message, ...]]:
    """Paths from the roots to the leaves, depth first, in the order of the rows."""
    children: dict[str | None, list[Message]] = {}
    for row in rows:
        children.setdefault(row["parent_id"] or None, []).append(row)
    stack: list[tuple[Message, ...]] = [(row,) for row in reversed(children.get(None, []))]
    while stack:
        path = stack.pop()
        below = children.get(path[-1]["message_id"], [])
        if not below:
            yield path
        elif best:
            ranks = [float("inf") if row["rank"] is None else row["rank"] for row in below]
            stack.append((*path, below[ranks.index(min(ranks))]))
        else:
            stack.extend((*path, row) for row in reversed(below))


def _attached(rows: Sequence[Message]) -> list[Message]:
    """The messages whose ancestors are all there, up to a root."""
    parents = {row["message_id"]: row["parent_id"] or None for row in rows}
    reached: set[str | None] = {None}
    for message in _parents_first(rows):
        if message in parents and parents[message] in reached:
            reached.add(message)
    return [row for row in rows if row["message_id"] in reached]


def _parents_first(rows: Sequence[Message]) -> list[str | None]:
    """Ids of messages and of their parents; refuses messages that are their own ancestors."""
    sorter = TopologicalSorter({row["message_id"]: [row["parent_id"] or None] for row in rows})
    try:
        return list(sorter.static_order())
    except CycleError as error:
        raise ValueError(
            f"messages are their own ancestors, such as {error.args[1][0]}; the file is damaged."
        ) from None


def _split(rows: Sequence[Message], share: float | None) -> dict[str, list[Message]]:
    if share is None or not 0 < share < 1:
        raise ValueError(f"chat.validation_share={share}; messages.parquet is one file: needed: above 0, below 1.")
    parts: dict[str, list[Message]] = {"train": [], "validation": []}
    for row in rows:
        drawn = int.from_bytes(hashlib.sha256(row["message_tree_id"].encode()).digest()[:8], "big") / 2**64
        parts["validation" if drawn < share else "train"].append(row)
    return parts


def _files(folder: Path, split: str) -> list[Path]:
    found = {place: files for place in (folder / "data", folder) if (files := shards(place, split))}
    if len(found) > 1:
        raise ValueError(f"{folder} has {split}-*.parquet and data/{split}-*.parquet; keep one.")
    if not found:
        raise ValueError(
            f"{folder} has no {split}-*.parquet, nor data/{split}-*.parquet as on the hub, nor messages.parquet; "
            "fetch it again."
        )
    return next(iter(found.values()))


def _read(files: Sequence[Path], data: Mapping[str, Any]) -> tuple[list[Message], str]:
    table, digest = read_files(files)
    return _rows(table, data, str(files[0])), digest


def _rows(table: pa.Table, data: Mapping[str, Any], label: str) -> list[Message]:
    """The columns that the options need, as dictionaries, after checking them."""
    needed = [*COLUMNS]
    needed += ["lang"] * (data["languages"] is not None) + ["rank"] * (data["threads"] == "best")
    needed += ["deleted"] * (data["deleted"] == "drop") + ["review_result"] * (data["review"] == "passed")
    if missing := [name for name in needed if name not in table.column_names]:
        raise ValueError(f"{label}: columns {missing} are missing; the file has {table.column_names}, needed {needed}.")
    for name in ("message_id", "role", "message_tree_id"):
        if table.column(name).null_count:
            raise ValueError(f"{label}: column {name} has empty cells; every message needs one.")
    rows = table.select(needed).to_pylist()
    if unknown := sorted({row["role"] for row in rows} - set(ROLES)):
        raise ValueError(f"{label}: roles {unknown} are unknown; allowed: {', '.join(ROLES)}.")
    if repeated := [name for name, count in Counter(row["message_id"] for row in rows).items() if count > 1]:
        raise ValueError(f"{label}: {len(repeated)} message ids repeat, such as {repeated[0]}; the file is damaged.")
    return rows
