"""A hub of models and datasets: what a repository holds at one commit, and its files, over huggingface.co's protocol.

huggingface_hub is imported inside functions. Every way in which a hub can refuse becomes a
`FetchError`: one line that says what is wrong and what to do.
"""

import fnmatch
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from finetune.fetch.transport import open_client

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
OURS = (SUMS, f"{SUMS}.old", ".incomplete", ".corrupt")
"""How the names of files end that a folder holds beside what was fetched."""


class FetchError(RuntimeError):
    """Why a folder is not complete, and what to do about it, in one line."""


@dataclass(frozen=True)
class Source:
    """One folder of files at one commit of a hub repository.

    Attributes:
        repo: Name on the hub, `owner/name`.
        revision: Commit, 40 hexadecimal digits.
        folder: Where the files go, below the root.
        files: Patterns of paths in the repository; each must match.
        kind: `model` or `dataset`.
        prefix: Start of the paths in the repository that `folder` already stands for (`cola/`).
        checksums: Path below `folder` -> pinned sha256.
    """

    repo: str
    revision: str
    folder: str
    files: tuple[str, ...]
    kind: str = "model"
    prefix: str = ""
    checksums: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if not re.fullmatch(r"[0-9a-f]{40}", str(self.revision)):
            raise ValueError(f"{self.repo}: revision is {self.revision!r}; pin a commit (40 hexadecimal digits)")
        check_below(self.folder, f"{self.repo}: folder", "a path below data.root")
        for path in self.checksums:
            if not any(fnmatch.fnmatchcase(self.prefix + path, pattern) for pattern in self.files):
                raise ValueError(f"{self.repo}: {path!r} has a pinned checksum but is not among files {self.files}")

    def __str__(self):
        return f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class HubFile:
    """One file as it must be: path below the folder, size in bytes, and a sha256 or a git blob id (or both)."""

    path: str
    size: int
    sha256: str | None
    blob: str | None = None

    def partial(self, folder: Path) -> Path:
        """Where an unfinished download waits: named after the content, so that another revision never resumes it."""
        return folder / f"{self.path}.{(self.sha256 or self.blob or '')[:8]}.incomplete"


class Hub:
    """A server that speaks huggingface.co's protocol.

    Args:
        endpoint: Its address; None: huggingface_hub's default.
        token: Access token; None: anonymous. A token stored on disk is never used.
    """

    def __init__(self, endpoint: str | None = None, token: str | None = None):
        from huggingface_hub import HfApi

        self._token: str | bool = (token or "").strip() or False
        self._api = HfApi(endpoint=endpoint, token=self._token)
        self._infos: dict[tuple[str, str, str], Any] = {}

    def files(self, source: Source) -> tuple[HubFile, ...]:
        """The files of a source as the hub lists them; a FetchError if one lacks, or is not what is pinned."""
        from huggingface_hub import get_hf_file_metadata

        info = self._info(source)
        listed = {str(sibling.rfilename): sibling for sibling in info.siblings or ()}
        for pattern in source.files:
            if not fnmatch.filter(listed, pattern):
                raise FetchError(f"{source} has no file {pattern!r}; it has {', '.join(sorted(listed)) or 'none'}")
        wanted = sorted(name for name in listed if any(fnmatch.fnmatchcase(name, p) for p in source.files))
        if getattr(info, "gated", False):
            # A gated repository lists its files to everyone: ask for one now, not after hours of other downloads.
            with self._explained(source):
                get_hf_file_metadata(self._url(source, wanted[0]), token=self._token)
        return tuple(_hub_file(source, listed[name]) for name in wanted)

    def _info(self, source: Source) -> Any:
        key = (source.kind, source.repo, source.revision)
        if key not in self._infos:
            ask = self._api.model_info if source.kind == "model" else self._api.dataset_info
            with self._explained(source):
                try:
                    self._infos[key] = ask(source.repo, revision=source.revision, files_metadata=True, timeout=60)
                except (AttributeError, KeyError, TypeError) as error:  # JSON of another shape
                    raise FetchError(f"{source}: the hub's answer is no listing ({type(error).__name__})") from error
            if self._infos[key].sha != source.revision:
                raise FetchError(f"{source}: the hub answers with commit {self._infos[key].sha!r}: do not trust it")
        return self._infos[key]

    def download(self, source: Source, file: HubFile, partial: Path) -> None:
        """Downloads what `partial` does not hold yet; a FetchError if that brings nothing, or the disk is full."""
        from huggingface_hub.utils import build_hf_headers

        with self._explained(source):
            headers = build_hf_headers(token=self._token)
            download(self._url(source, source.prefix + file.path), file, partial, headers)

    def _url(self, source: Source, path: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(
            source.repo, path, repo_type=source.kind, revision=source.revision, endpoint=self._api.endpoint
        )

    @property
    def endpoint(self) -> str:
        """Its address."""
        return self._api.endpoint

    @contextmanager
    def _explained(self, source: Source) -> Iterator[None]:
        try:
            open_client()
            yield
        except (transport_error(), OSError, ValueError) as error:  # ValueError: no JSON, a malformed name
            raise FetchError(self._explanation(source, error)) from error

    def _explanation(self, source: Source, error: Exception) -> str:
        from huggingface_hub import errors

        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        page = f"{self._api.endpoint}/{'' if source.kind == 'model' else 'datasets/'}{source.repo}"
        if isinstance(error, errors.OfflineModeIsEnabled):
            named = "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE)"
            return f"{source} must be downloaded, but {named} is set: unset it to fetch"
        if isinstance(error, errors.GatedRepoError) or status in (401, 403):
            token = "a token was sent, it gives no access" if self._token else "HF_TOKEN is not set"
            return (
                f"{source}: access refused (HTTP {status}, gated, private or misnamed): accept the licence at {page} "
                f"and set HF_TOKEN to a token of that account ({token})"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{source.repo} has no revision {source.revision}: check `revision`"
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"there is no {source.kind} at {page}: check its name"
        if status is not None:
            return f"{source}: the hub answers {first_line(error)}"
        if isinstance(error, transport_error()):
            return f"{source}: {self._api.endpoint} can't be reached, run again to go on: {first_line(error)}"
        return f"{source}: {first_line(error)}"


def transport_error() -> type[Exception]:
    """What the client library below huggingface_hub raises; which library that is changes with its version."""
    from huggingface_hub import errors

    return errors.HTTPError  # pyright: ignore[reportPrivateImportUsage] # the one name that holds for either library


def download(url: str, file: HubFile, partial: Path, headers: Mapping[str, str]) -> None:
    """Download what `partial` does not hold yet, over as many connections as it takes, while each brings something."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    # hf_hub_download throws away a partial file (2.4.0: one temporary name per process), which costs up to 10 GB
    # per killed download here; its own http_get can resume.
    headers = {**headers, "Accept-Encoding": "identity"}
    while (done := size_of(partial)) < file.size:
        try:
            with partial.open("ab") as handle:
                bounded: Any = _Bounded(handle, file.size)
                http_get(url, bounded, resume_size=done, headers=headers, displayed_filename=file.path)
                handle.flush()
                os.fsync(handle.fileno())
            break
        except transport_error() as error:
            if isinstance(error, HfHubHTTPError) or size_of(partial) <= done:
                raise
            log.warning("%s: %s; resuming at byte %d", file.path, first_line(error), size_of(partial))


class _Bounded:
    """A file that takes no more bytes than were announced: a server that sends on would fill the disk."""

    def __init__(self, handle: BinaryIO, most: int):
        self._handle, self._most = handle, most

    def write(self, part: bytes) -> int:
        if self._handle.tell() + len(part) > self._most:
            raise FetchError(f"{self._handle.name}: the server sends more than the {self._most} bytes that it lists")
        return self._handle.write(part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def _hub_file(source: Source, listed: Any) -> HubFile:
    path = listed.rfilename.removeprefix(source.prefix)
    pinned, lfs = source.checksums.get(path), listed.lfs
    if not path.isprintable() or "\\" in path or Path(path).is_absolute() or {"", "..", "."} & set(path.split("/")):
        raise FetchError(f"{source} lists {path!r}, which would leave the folder: do not trust this hub")
    if path.endswith(OURS):
        raise FetchError(f"{source} lists {path}, a name that fetching keeps for itself")
    if not _is_whole(listed.size):
        raise FetchError(f"{source}: the hub gives no size for {path}, so the disk space can't be estimated")
    for kind, digest, digits in (("sha256", lfs and lfs.sha256, 64), ("blobId", listed.blob_id, 40)):
        if digest is not None and not re.fullmatch(rf"[0-9a-f]{{{digits}}}", str(digest)):
            raise FetchError(f"{source}: the hub gives {kind} {digest!r} for {path}, no {digits} hexadecimal digits")
    if lfs and pinned and pinned != lfs.sha256:
        raise FetchError(f"{source}: {path} is pinned to sha256 {pinned}, but the hub lists {lfs.sha256}")
    if not (lfs or pinned or listed.blob_id):
        raise FetchError(f"{source}: the hub gives no checksum for {path}, and none is pinned")
    # For an LFS file the blob id is that of its pointer.
    return HubFile(path, listed.size, pinned or (lfs.sha256 if lfs else None), None if lfs else listed.blob_id)


def _is_whole(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 0


def check_below(path: Any, what: str, wanted: str) -> None:
    """Refuse a path that is empty or leaves the folder that it is below."""
    place = Path(str(path or "/"))
    if place.is_absolute() or ".." in place.parts:
        raise ValueError(f"{what} is {path!r}; give {wanted}")


def size_of(path: Path) -> int:
    """The size of a file in bytes, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def first_line(error: Exception) -> str:
    """What an error says first; its kind if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
