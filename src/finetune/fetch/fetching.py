"""Models and datasets from their public source into one folder tree, every file verified.

`sources` turns an experiment's names into folders of a hub or of GitHub, `plan` says what each consists of, `fetch`
gets what is missing, `verify` re-checks without a network. The tree has the hub's own layout:

    <root>/models/bert-base-uncased/model.safetensors        <root>/glue/cola/train-00000-of-00001.parquet

A folder is complete if and only if it holds SHA256SUMS (`sha256sum -c` reads it; its comment names the source). That
file is written last, by a rename, and renamed to SHA256SUMS.old when a check fails. A bad file is renamed, not deleted.
"""

import fnmatch
import hashlib
import itertools
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.fetch.github import GitHub, GitHubSource
from finetune.fetch.hub import SUMS, FetchError, Hub, HubFile, Source, size_of
from finetune.fetch.transport import use_for
from finetune.store.files import write_atomically

log = logging.getLogger(__name__)

AnySource = Source | GitHubSource


@dataclass(frozen=True)
class Servers:
    """Both servers; a source is asked of the server that has it."""

    hub: Hub
    github: GitHub

    @classmethod
    def of(cls, wanted: Sequence[AnySource], environment: Mapping[str, str]) -> "Servers":
        """The servers and the token that the environment names; those of this machine are reached without a proxy."""
        hub = Hub(environment.get("HF_ENDPOINT") or None, environment.get("HF_TOKEN"))
        github = GitHub(environment.get("GITHUB_RAW_ENDPOINT") or None)
        use_for({(github if isinstance(source, GitHubSource) else hub).endpoint for source in wanted})
        return cls(hub, github)

    def files(self, source: AnySource) -> tuple[HubFile, ...]:
        """The files of a source, as its server lists them."""
        return self.github.files(source) if isinstance(source, GitHubSource) else self.hub.files(source)

    def download(self, source: AnySource, file: HubFile, partial: Path) -> None:
        """Downloads what `partial` does not hold yet."""
        if isinstance(source, GitHubSource):
            self.github.download(source, file, partial)
        else:
            self.hub.download(source, file, partial)


@dataclass(frozen=True)
class Item:
    """One line of the plan: a source, its folder on disk, its files, and why it can't be fetched (or None)."""

    source: AnySource
    folder: Path
    files: tuple[HubFile, ...] = ()
    complete: bool = False
    error: str | None = None

    @property
    def missing(self) -> int:
        """Bytes still to be downloaded."""
        wanted = [] if self.complete else [f for f in self.files if not (self.folder / f.path).exists()]
        return sum(max(f.size - size_of(f.partial(self.folder)), 0) for f in wanted)

    def __str__(self):
        if self.error:
            return f"{self.source.folder}: {self.error}"
        size = sum(f.size for f in self.files)
        state = "complete" if self.complete else f"{human(self.missing)} to download"
        return f"{self.source.folder}: {self.source}, {len(self.files)} files, {human(size)}: {state}"


def sources(
    experiment: Mapping[str, Any],
    models: Mapping[str, Mapping],
    data: Mapping[str, Mapping],
    questions: Mapping[str, Mapping] | None = None,
) -> list[AnySource]:
    """The folders that an experiment needs; what the pipeline makes itself has no source.

    Args:
        experiment: `models`, `decoders`, `efficiency_models` and `tasks`, lists of names.
        models: Name -> content of conf/model/<name>.yaml.
        data: Name -> content of conf/data/<name>.yaml or conf/chat/<name>.yaml; with `tasks` each of the experiment's
            tasks is one folder, otherwise `files` gives the patterns.
        questions: Name -> content of conf/questions/<name>.yaml, whose `sources` are single files of GitHub.

    Raises:
        ValueError: An unknown task, an unpinned revision or file, or two sources for one folder.
    """
    found: list[AnySource] = []
    lists = (experiment.get(key) or [] for key in ("models", "decoders", "efficiency_models"))
    for name in dict.fromkeys(itertools.chain.from_iterable(lists)):
        model = models[name]
        if model.get("checkpoint") and not Path(model["checkpoint"]).is_dir():
            sums, files = dict(model.get("checksums") or {}), tuple(model["files"])
            found.append(Source(model["checkpoint"], model["revision"], model["folder"], files, checksums=sums))
    for config in data.values():
        if config.get("source"):
            found += _dataset(config, experiment.get("tasks") or [])
    for config in (questions or {}).values():
        if config.get("sources"):
            found.append(GitHubSource.read(config["folder"], config["sources"]))
    by_folder: dict[str, AnySource] = {}
    for source in found:
        other = by_folder.setdefault(source.folder, source)
        if other != source:
            raise ValueError(f"{source.folder} is the folder of both {other} and {source}; give each its own")
    return list(by_folder.values())


def _dataset(config: Mapping[str, Any], tasks: Sequence[str]) -> list[Source]:
    repo, revision, folder = config["source"], config["revision"], config["folder"]
    sums = dict(config.get("checksums") or {})
    if not config.get("tasks"):
        return [Source(repo, revision, folder, tuple(config["files"]), "dataset", checksums=sums)]
    if unknown := sorted(set(tasks) - set(config["tasks"])):
        raise ValueError(f"tasks {unknown} are not in {repo}; allowed: {sorted(config['tasks'])}")
    found = []
    for task in tasks:
        start = f"{task}/"
        pinned = {path.removeprefix(start): sha for path, sha in sums.items() if path.startswith(start)}
        found.append(Source(repo, revision, f"{folder}/{task}", (f"{start}*.parquet",), "dataset", start, pinned))
    return found


def plan(wanted: Sequence[AnySource], root: Path, servers: Servers) -> list[Item]:
    """What every source consists of and what is missing; asks the servers about incomplete folders only."""
    items = []
    for source in wanted:
        folder = Path(root) / source.folder
        try:
            kept = _kept(source, folder)
            items.append(Item(source, folder, kept or servers.files(source), complete=bool(kept)))
        except FetchError as error:
            items.append(Item(source, folder, error=str(error)))
    return items


def check_room(items: Sequence[Item], root: Path) -> None:
    """Raises a FetchError if the missing bytes don't fit on the disk that holds `root`."""
    missing = sum(item.missing for item in items)
    existing = next(path for path in (Path(root).absolute(), *Path(root).absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise FetchError(
            f"{human(missing)} to download, but {root} has room for {human(free)}: choose another data.root"
        )


def _kept(source: AnySource, folder: Path) -> tuple[HubFile, ...]:
    """The files of a folder that is complete; empty if it is not."""
    if not (folder / SUMS).is_file():
        return ()
    label, sums = _read_sums(source, folder)
    matched = all(fnmatch.filter([source.prefix + name for name in sums], pattern) for pattern in source.files)
    if label is None or not matched or not all((folder / name).is_file() for name in sums):
        return ()
    return tuple(HubFile(name, size_of(folder / name), sha) for name, sha in sums.items())


def fetch(items: Sequence[Item], servers: Servers) -> list[str]:
    """Downloads and verifies every item; one that fails does not stop the others. Returns the errors, one line each."""
    errors = [item.error for item in items if item.error]
    for item in items:
        try:
            if item.error:
                continue
            if item.complete:
                verify(item.source, item.folder)
            else:
                _complete(item, servers)
        except FetchError as error:
            log.error("%s", error)
            errors.append(str(error))
    return errors


def _complete(item: Item, servers: Servers) -> None:
    _unfinish(item.folder)
    sums = {}
    missing = item.missing
    for file in item.files:
        target = item.folder / file.path
        if target.exists():
            sums[file.path] = _verified(target, file, target)
        else:
            partial = file.partial(item.folder)
            servers.download(item.source, file, partial)
            sums[file.path] = _verified(partial, file, target)
            os.replace(partial, target)
    text = f"# {item.source}\n" + "".join(f"{sha}  {name}\n" for name, sha in sums.items())
    write_atomically(item.folder / SUMS, text)
    log.info("%s: %s downloaded, %d files verified", item.folder, human(missing), len(sums))


def verify(source: AnySource, folder: Path) -> None:
    """Re-checks a complete folder against its SHA256SUMS and the pinned checksums; needs no network.

    Raises:
        FetchError: The folder is not complete, or a file is missing or differs (it is renamed to `*.corrupt`).
    """
    if not (folder / SUMS).is_file():
        raise FetchError(f"{folder} is not complete, it has no {SUMS}: run fetch without verify=true")
    _, sums = _read_sums(source, folder)
    bad = [f"{folder / name} is missing" for name in {**sums, **source.checksums} if not (folder / name).is_file()]
    for name, sha in sums.items():
        try:
            if (folder / name).is_file():
                _verified(folder / name, HubFile(name, 0, source.checksums.get(name, sha)), folder / name)
        except FetchError as error:
            bad.append(str(error))
    if bad:
        _unfinish(folder)
        raise FetchError("; ".join(bad))
    log.info("%s: %d files verified", folder, len(sums))


def _unfinish(folder: Path) -> None:
    if (folder / SUMS).exists():
        os.replace(folder / SUMS, folder / f"{SUMS}.old")


def _verified(path: Path, file: HubFile, target: Path) -> str:
    """The sha256 of `path` if it is the file; otherwise renames it to `target` + `.corrupt` and raises."""
    with path.open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    expected, received = file.sha256, sha256
    if file.sha256 in (None, sha256) and file.blob:  # not of large files, which the hub keeps elsewhere
        blob = hashlib.sha1(b"blob %d\0" % size_of(path) + path.read_bytes(), usedforsecurity=False)
        expected, received = f"git blob {file.blob}", f"git blob {blob.hexdigest()}"
    if expected == received:
        return sha256
    names = (f"{target}{f'.{n}' if n else ''}.corrupt" for n in itertools.count())
    away = next(name for name in names if not os.path.lexists(name))
    os.rename(path, away)
    raise FetchError(f"{target}: expected {expected}, received {received}; kept as {Path(away).name}, run fetch again")


def source_of(folder: Path) -> str | None:
    """The source that a fetched folder names, such as ``owner/name@commit``; None where nothing says."""
    if not (folder / SUMS).is_file():
        return None
    first = (folder / SUMS).read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return first[2:] if first.startswith("# ") else None


def _read_sums(source: AnySource, folder: Path) -> tuple[str | None, dict[str, str]]:
    """The source that a folder's sums name, if any, which must be this one; and sha256 by path."""
    label, sums = None, {}
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("# "):
            label = line[2:]
        elif match := re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line):
            sums[match[2]] = match[1]
        elif line:
            raise FetchError(f"{folder / SUMS}: not a line of sha256sum: {line!r}; move the file away and fetch again")
    if label not in (None, str(source)):
        raise FetchError(f"{folder} holds {label}, not {source}: move the folder away or choose another data.root")
    return label, sums


def human(size: float) -> str:
    """A number of bytes for people: `90.9 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"
