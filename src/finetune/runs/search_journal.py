"""The journal of a search: Optuna's log, an operation a line, each line checked by a hash of all that stands before it.

Optuna's own file takes a lock that outlives a killed process, glues the next line to a torn one, and reads a flipped
digit as another score. Here the cell's writer holds a lock that dies with it, and the journal counts up to its first
damaged line: a search draws the same trials again, so a shorter journal costs time and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from finetune.store.files import write_atomically
from finetune.store.lines import append_line, cut, whole_lines

_SUM = re.compile(rb'(.*),"sum":"([0-9a-f]{16})"}\n')
_START = b'{"op_code":'


class SearchJournal(BaseJournalBackend):
    """Optuna's operations in a JSONL file. One process writes, from one thread.

    Args:
        path: JSONL file; made, with its folder, by the first operation. A torn last line is taken off; from a damaged
            line on the rest is taken off too, and the file as it was is kept in ``earlier/``. Lines at the beginning
            may be without hashes: Optuna's own file has none.

    Raises:
        ValueError: if the file is no journal of a search.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._logs, self._hash = Path(path), [], hashlib.sha256()
        there, summed = whole_lines(self._path), False
        for line in there:
            log, found = self._read(line)
            if log is None or (summed and not found):
                break
            summed = summed or found
            self._logs.append(log)
            self._hash.update(line)
        start = self._path.read_bytes()[: len(_START)] if self._path.exists() else b""
        if not _START.startswith(start):
            raise _foreign(self._path)
        if len(self._logs) < len(there):
            write_atomically(self._path.parent / "earlier" / self._path.name, self._path.read_bytes())
        cut(self._path, there[: len(self._logs)])

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Operations from this number on."""
        return iter(self._logs[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write operations; each is on the disk when this returns, and a refused one leaves no part.

        Raises:
            OSError: if one can't be written.
        """
        for log in logs:
            body = json.dumps(log, separators=(",", ":")).encode()
            line = body[:-1] + b',"sum":"' + self._sum(body[:-1]) + b'"}\n'
            append_line(self._path, line)
            self._hash.update(line)
            self._logs.append(json.loads(body))

    def _sum(self, body: bytes) -> bytes:
        found = self._hash.copy()
        found.update(body)
        return found.hexdigest()[:16].encode()

    def _read(self, line: bytes) -> tuple[dict[str, Any] | None, bool]:
        """An operation, None of a damaged line, and whether the line has a hash."""
        match = _SUM.fullmatch(line)
        if match and match[2] != self._sum(match[1]):
            return None, True
        try:
            log = json.loads(match[1] + b"}" if match else line)
        except (ValueError, RecursionError):
            return None, bool(match)
        return (log if isinstance(log, dict) and "op_code" in log else None), bool(match)


def open_storage(path: str | Path) -> JournalStorage:
    """The trials of a journal file, which this process alone writes.

    Raises:
        ValueError: if the file is no journal of a search.
    """
    try:
        return JournalStorage(SearchJournal(path))
    except (KeyError, TypeError, IndexError, AttributeError):  # operations that Optuna has not
        raise _foreign(path) from None


def _foreign(path: str | Path) -> ValueError:
    return ValueError(f"{path} is no journal of a search: move it away, and the search begins anew.")
