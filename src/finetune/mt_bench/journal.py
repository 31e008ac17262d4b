"""An append-only JSONL file, one item a line: what was written stays, through a kill and through a full disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.store.files import write_atomically

Item = dict[str, Any]


class Journal:
    """The items of a file by key; the last line of a key wins. One process writes, from one thread.

    A last line without its end, which a kill cut short, is taken off the file, so that its item is done again. Items
    that are not wanted any more are moved to ``earlier/`` beside the file, and come back when they are wanted again.

    Args:
        path: JSONL file; made, with its folder, by the first :meth:`append`.
        key: what makes an item the same item.

    Attributes:
        items: the items by key, in the order of the file.

    Raises:
        ValueError: if a line other than a torn last one holds no item; the message gives its number.
    """

    def __init__(self, path: str | Path, key: Callable[[Mapping[str, Any]], Hashable]) -> None:
        self.path = Path(path)
        self._key = key
        self.items: dict[Hashable, Item] = {}
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            item = _parse(self.path, number, line)
            try:
                self.items[key(item)] = item
            except KeyError as error:
                raise ValueError(f"{self.path}, line {number} has no field {error}: repair it or remove it.") from None
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    def append(self, item: Mapping[str, Any]) -> None:
        """Write an item: it is on the disk when this returns.

        Raises:
            ValueError: if it can't be written (a full disk); the file then ends with its last whole line.
        """
        line = json.dumps(item, allow_nan=False).encode() + b"\n"
        with _clear_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(line)
        self.items[self._key(item)] = dict(item)

    def rewrite(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Replace the file's content by these items, in their order, at once.

        Raises:
            ValueError: if they can't be written; the file then holds what it held.
        """
        found = {self._key(item): dict(item) for item in items}
        write_items(self.path, found.values())
        self.items = found

    def recall(self, wanted: Iterable[Hashable]) -> dict[Hashable, Item]:
        """The items of these keys that there are, here or in ``earlier/``."""
        known = self._earlier().items | self.items
        return {key: known[key] for key in wanted if key in known}

    def keep(self, items: Mapping[Hashable, Item]) -> None:
        """Leave these items in the file, and move the others to ``earlier/``."""
        earlier = self._earlier()
        for key, item in self.items.items():
            if key not in items and key not in earlier.items:
                earlier.append(item)
        if self.items != items or not self.path.exists():
            self.rewrite(items.values())

    def _earlier(self) -> Journal:
        return Journal(self.path.parent / "earlier" / self.path.name, self._key)

    def _append(self, line: bytes) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(handle).st_size
            try:
                rest = memoryview(line)
                while rest:  # the system may take a part, as when the disk has room for no more
                    rest = rest[os.write(handle, rest) :]
                os.fsync(handle)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)


@contextmanager
def _clear_error(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a user's error."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path} can't be written ({error.strerror or error}). What is written is kept: make room, and run again."
        ) from None


def read_items(path: str | Path) -> list[Item]:
    """The items of a JSONL file that another stage wrote; the file is left as it is.

    Raises:
        ValueError: if the file is missing, or a line holds no item; the message gives its number.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run the stage that writes it, or give the path of a file that does.")
    lines = path.read_bytes().splitlines()
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def write_items(path: str | Path, items: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file at once.

    Raises:
        ValueError: if it can't be written; what was there stays.
    """
    content = "".join(json.dumps(item, allow_nan=False) + "\n" for item in items)
    with _clear_error(Path(path)):
        write_atomically(path, content)


def _parse(path: Path, number: int, line: bytes) -> Item:
    try:
        item = json.loads(line)
        if not isinstance(item, dict):
            raise ValueError(f"a {type(item).__name__}, not an object")
    except ValueError as error:
        raise ValueError(f"{path}, line {number} holds no item ({error}): repair it or remove it.") from None
    return item
