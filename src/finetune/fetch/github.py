"""Single files of GitHub repositories over plain HTTPS, each pinned by its sha256.

GitHub's raw server lists nothing and gives no checksums, so a source names every file and the checksum that it must
have. That checksum, not the name of a revision, says which content is meant: a tag will do. No account is used.
"""

import http.client
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finetune.fetch.hub import FetchError, HubFile, check_below, size_of

log = logging.getLogger(__name__)

ENDPOINT = "https://raw.githubusercontent.com"
TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class GitHubFile:
    """One file: repository `owner/name`, commit or tag, path in the repository, place below the folder, sha256."""

    repo: str
    revision: str
    path: str
    file: str
    sha256: str

    def __post_init__(self):
        for name, pattern, wanted in (
            ("repo", r"[\w.-]+/[\w.-]+", "owner/name"),
            ("revision", r"(?!(main|master|HEAD)$)[\w.-]+", "a commit or a tag, a branch moves on"),
            ("sha256", r"[0-9a-f]{64}", "64 hexadecimal digits, the only thing that pins the content"),
        ):
            given = getattr(self, name)
            if not isinstance(given, str) or not re.fullmatch(pattern, given):
                raise ValueError(f"{self.repo}: {self.path}: {name} is {given!r}; give {wanted}")
        for name in ("path", "file"):
            check_below(getattr(self, name), f"{self.repo}: {name}", "a relative path without '..'")


@dataclass(frozen=True)
class GitHubSource:
    """One folder of files from one or several repositories; shared attributes: `finetune.fetch.hub.Source`."""

    folder: str
    entries: tuple[GitHubFile, ...]
    prefix = ""

    def __post_init__(self):
        check_below(self.folder, f"{self}: folder", "a path below data.root")
        twice = sorted({name for name in self.files if self.files.count(name) > 1})
        if twice or not self.entries:
            raise ValueError(f"{self.folder}: sources name {twice or 'no file'} {'twice' if twice else ''}".rstrip())

    @classmethod
    def read(cls, folder: str, entries: Iterable[Mapping[str, Any]]) -> "GitHubSource":
        """A source from a configuration's list of `{repo, revision, path, file, sha256}`.

        Raises:
            ValueError: A key is missing or unknown, a checksum is not pinned, a path leaves its folder, or a file is
                named twice.
        """
        keys, found = set(GitHubFile.__dataclass_fields__), []
        for entry in entries:
            if set(entry) != keys:
                raise ValueError(f"{folder}: sources has an entry with keys {sorted(entry)}; it needs {sorted(keys)}")
            found.append(GitHubFile(**entry))
        return cls(folder, tuple(found))

    @property
    def files(self) -> tuple[str, ...]:
        """Paths below the folder."""
        return tuple(entry.file for entry in self.entries)

    @property
    def checksums(self) -> dict[str, str]:
        """Path below the folder -> pinned sha256; every file has one."""
        return {entry.file: entry.sha256 for entry in self.entries}

    def __str__(self):
        return " + ".join(sorted({f"{entry.repo}@{entry.revision}" for entry in self.entries}))


class GitHub:
    """A server that serves `<endpoint>/<owner>/<name>/<revision>/<path>`.

    Args:
        endpoint: Its address; None: GitHub's own.
    """

    def __init__(self, endpoint: str | None = None):
        self._endpoint = (endpoint or ENDPOINT).rstrip("/")

    def files(self, source: GitHubSource) -> tuple[HubFile, ...]:
        """The files of a source with the sizes that the server gives.

        Raises:
            FetchError: The server can't be reached, has no such file, or gives no size.
        """
        found = []
        for entry in source.entries:
            with self._answer(entry, "HEAD") as answer:
                size = answer.headers.get("Content-Length")
            if size is None or not size.isdigit():
                raise FetchError(f"{self._url(entry)}: the server gives no size, so the disk space can't be estimated")
            found.append(HubFile(entry.file, int(size), entry.sha256))
        return tuple(found)

    def download(self, source: GitHubSource, file: HubFile, partial: Path) -> None:
        """Downloads what `partial` does not hold yet.

        Raises:
            FetchError: The connection failed without any progress, or the disk is full.
        """
        entry = next(entry for entry in source.entries if entry.file == file.path)
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            while (done := size_of(partial)) < file.size:
                self._append(entry, partial, done)
                now = size_of(partial)
                if now <= done:
                    url = self._url(entry)
                    raise FetchError(f"{url}: the connection ended at byte {now} of {file.size}, run again to go on")
                if now < file.size:
                    log.warning("%s: the connection was cut; resuming at byte %d", file.path, now)
        except OSError as error:
            raise FetchError(f"{partial}: {error}") from error

    def _append(self, entry: GitHubFile, partial: Path, done: int) -> None:
        with self._answer(entry, "GET", done) as answer, partial.open("ab") as handle:
            if done and not (answer.headers.get("Content-Range") or "").startswith(f"bytes {done}-"):
                handle.truncate(0)  # the server sends the whole file, whatever was asked
            while block := _read(answer):
                handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())

    @contextmanager
    def _answer(self, entry: GitHubFile, verb: str, start: int = 0) -> Iterator[http.client.HTTPResponse]:
        url = self._url(entry)
        headers = {"Accept-Encoding": "identity", "User-Agent": "finetune"}
        headers |= {"Range": f"bytes={start}-"} if start else {}
        try:
            answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=verb), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                raise FetchError(f"there is no {url}: check repo, revision and path in `sources`") from error
            raise FetchError(f"{url}: the server answers HTTP {error.code} {error.reason}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: no address
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise FetchError(f"{self._endpoint} can't be reached, run again to go on: {reason}") from error
        with answer:
            yield answer

    def _url(self, entry: GitHubFile) -> str:
        return f"{self._endpoint}/{entry.repo}/{entry.revision}/{quote(entry.path)}"


def _read(answer: http.client.HTTPResponse) -> bytes:
    """The next bytes; none at the end and where the connection is cut."""
    try:
        return answer.read1(1 << 16)
    except (OSError, http.client.HTTPException):
        return b""
