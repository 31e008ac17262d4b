"""An append-only JSONL file, one item a line: what was written stays, through a kill and through a full disk.

Each line carries a checksum of the rest of it (``line_sha256``), so that a flipped byte or an edit is found. Items are
handed out without it. FastChat's loaders pass over the field.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.store.files import write_atomically
from finetune.store.lines import append_line, cut, whole_lines

log = logging.getLogger(__name__)

Item = dict[str, Any]

CHECKSUM = "line_sha256"


class Journal:
    """The items of a file by key; the last line of a key wins. One process writes, from one thread.

    A last line without its end, which a kill cut short, is taken off the file, so that its item is done again; so is
    what is not believed: a line whose checksum does not fit, or with a fault. The log names them. Items that are not
    wanted any more are moved to ``earlier/`` beside the file, and come back when they are wanted again.

    Args:
        path: JSONL file; made, with its folder, by the first :meth:`append`.
        key: what makes an item the same item.
        fault: says what is wrong with an item, or None.
        checked: whether a line without a checksum is a fault.

    Attributes:
        items: the items by key, in the order of the file.

    Raises:
        ValueError: if a line other than a torn last one holds no item; the message gives its number.
    """

    def __init__(
        self,
        path: str | Path,
        key: Callable[[Mapping[str, Any]], Hashable],
        fault: Callable[[Mapping[str, Any]], str | None] = lambda item: None,
        checked: bool = False,
    ) -> None:
        self.path = Path(path)
        self._key, self._fault, self._checked = key, fault, checked
        self.items: dict[Hashable, Item] = {}
        lines = whole_lines(self.path)
        refused: Counter[str] = Counter()
        for number, line in enumerate(lines, start=1):
            item, wrong = _parse(self.path, number, line)
            wrong = wrong or ("no checksum" if checked and CHECKSUM not in item else fault(item))
            item.pop(CHECKSUM, None)
            if wrong is not None:
                refused[wrong] += 1
                continue
            try:
                self.items[key(item)] = item
            except (KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number} has no field {error}: repair it or remove it.") from None
        if refused:
            reasons = "; ".join(f"{reason} ({times})" for reason, times in refused.items())
            log.warning("%s: %d lines are not believed, done again: %s", path, refused.total(), reasons)
        cut(self.path, lines)
        self._as_on_disk = not refused

    def append(self, item: Mapping[str, Any]) -> None:
        """Write an item: it is on the disk when this returns.

        Raises:
            ValueError: if it can't be written (a full disk); the file then ends with its last whole line.
        """
        line = _line(item).encode()
        with _clear_error(self.path):
            append_line(self.path, line)
        self.items[self._key(item)] = dict(item)

    def rewrite(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Replace the file's content by these items, in their order, at once.

        Raises:
            ValueError: if they can't be written; the file then holds what it held.
        """
        found = {self._key(item): dict(item) for item in items}
        write_items(self.path, found.values())
        self.items, self._as_on_disk = found, True

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
        if self.items != items or not self._as_on_disk or not self.path.exists():
            self.rewrite(items.values())

    def _earlier(self) -> Journal:
        return Journal(self.path.parent / "earlier" / self.path.name, self._key, self._fault, self._checked)


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
        ValueError: if the file is missing, or a line holds no item, or does not fit its checksum; the message gives its
            number.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run the stage that writes it, or give the path of a file that does.")
    items = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            item, wrong = _parse(path, number, line)
            if wrong:
                raise ValueError(f"{path}, line {number}: {wrong}; run the stage that writes it again.")
            item.pop(CHECKSUM, None)
            items.append(item)
    return items


def write_items(path: str | Path, items: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file at once.

    Raises:
        ValueError: if it can't be written; what was there stays.
    """
    content = "".join(map(_line, items))
    with _clear_error(Path(path)):
        write_atomically(path, content)


def _line(item: Mapping[str, Any]) -> str:
    return json.dumps({**item, CHECKSUM: _checksum(item)}, allow_nan=False) + "\n"


def _checksum(item: Mapping[str, Any]) -> str:
    """Of an item's fields but the checksum itself, as JSON; a number that is not finite has none."""
    text = json.dumps({name: item[name] for name in item if name != CHECKSUM}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parse(path: Path, number: int, line: bytes) -> tuple[Item, str | None]:
    """The item of a line with its checksum, if it has one, and what is wrong with that."""
    try:
        item = json.loads(line)
        if not isinstance(item, dict):
            raise ValueError(f"a {type(item).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} holds no item ({error}): repair it or remove it.") from None
    wrong = CHECKSUM in item and item[CHECKSUM] != _checksum(item)
    return item, "it was changed after it was written (its checksum does not fit)" if wrong else None
