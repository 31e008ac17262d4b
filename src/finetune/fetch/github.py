"""Single files of GitHub repositories over plain HTTPS, each pinned by its sha256.

GitHub's raw server lists nothing and gives no checksums, so a source names every file and the checksum that it must
have. That checksum, not the name of a revision, says which content is meant: a tag will do. No account is used.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finetune.fetch.hub import FetchError, HubFile, check_below, download, first_line, transport_error
from finetune.fetch.transport import open_client

ENDPOINT = "https://raw.githubusercontent.com"
TIMEOUT = 60  # seconds without an answer
HEADERS = {"Accept-Encoding": "identity", "User-Agent": "finetune"}  # no account


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
        self.endpoint = (endpoint or ENDPOINT).rstrip("/")

    def files(self, source: GitHubSource) -> tuple[HubFile, ...]:
        """The files of a source with the sizes that the server gives; a FetchError where it gives none."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import hf_raise_for_status

        found = []
        for entry in source.entries:
            with self._explained(entry) as url:
                answer = get_session().head(url, headers=HEADERS, timeout=TIMEOUT)
                hf_raise_for_status(answer)
            size = answer.headers.get("Content-Length")
            if size is None or not re.fullmatch("[0-9]{1,18}", size):
                raise FetchError(f"{url}: the server gives no size, so the disk space can't be estimated")
            found.append(HubFile(entry.file, int(size), entry.sha256))
        return tuple(found)

    def download(self, source: GitHubSource, file: HubFile, partial: Path) -> None:
        """Downloads what `partial` does not hold yet; a FetchError if that brings nothing, or the disk is full."""
        entry = next(entry for entry in source.entries if entry.file == file.path)
        with self._explained(entry) as url:
            download(url, file, partial, HEADERS)

    @contextmanager
    def _explained(self, entry: GitHubFile) -> Iterator[str]:
        """The address of a file; what goes wrong with it becomes one line."""
        from huggingface_hub import errors

        url = f"{self.endpoint}/{entry.repo}/{entry.revision}/{quote(entry.path)}"
        try:
            open_client()
            yield url
        except errors.HfHubHTTPError as error:
            if error.response.status_code == 404:
                raise FetchError(f"there is no {url}: check repo, revision and path in `sources`") from error
            raise FetchError(f"{url}: the server answers {first_line(error)}") from error
        except (transport_error(), OSError, ValueError) as error:
            raise FetchError(f"{url} can't be fetched, run again to go on: {first_line(error)}") from error
