"""One archive of what an experiment's stages wrote: records, journals, answers, measurements; never weights.

A ``tar.xz`` of regular files, each under the name that it has below ``results/<experiment>``. Its first member,
``manifest.json``, says of which experiment, configuration, version and commit they are, and every file's sha256. Needs
the standard library alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.store.checks import check_record
from finetune.store.files import write_atomically
from finetune.store.records import listed_records

LIMIT = 16_000_000
"""Bytes of an archive."""

MANIFEST = "manifest.json"
_FORMAT = 1
_UNPACKED = 64 * LIMIT  # text becomes a tenth; more is no archive of ours
_NAME = r"[A-Za-z0-9][\w.+-]*"
_PACKED = re.compile(
    rf"runs/{_NAME}/{_NAME}/(cell|{_NAME}-seed\d+-[0-9a-f]{{12}})\.json"
    rf"|search/{_NAME}/{_NAME}/{_NAME}\.(json|journal|grid)"
    rf"|mt_bench/(answers|judgments)/{_NAME}/{_NAME}/{_NAME}\.(json|jsonl)"
    rf"|efficiency/{_NAME}/{_NAME}\.json"
    rf"|energy/{_NAME}/{_NAME}\.(json|safetensors)"  # its maps are pictures of gradients
    r"|(hosvd_cost|cost_curves)\.json"
)
_RUN = re.compile(r"(?P<run>.+-seed\d+)-[0-9a-f]{12}\.json")


def run_of(name: str) -> str | None:
    """The run that a file of ``runs`` is the record of, without its hash; None of other files."""
    match = _RUN.fullmatch(name) if name.startswith("runs/") else None
    return match["run"] if match else None


def is_list(name: str) -> bool:
    """Whether a file lists the records of its folder."""
    return PurePosixPath(name).name == "cell.json"


def collect(results: Path, origin: Mapping[str, Any]) -> dict[str, bytes]:
    """What stages wrote below ``results/<experiment>``, by its name there.

    Args:
        results: the folder.
        origin: of :func:`finetune.store.origin.origin_of`.

    Raises:
        ValueError: as :func:`check`; if there is nothing, or a list names a record that there is none of.
    """
    found = stage_files(results)
    if not found:
        raise ValueError(f"{results} holds nothing that a stage wrote: run the experiment first.")
    check(results, found, origin)
    for name in filter(is_list, found):
        if missing := [
            one for one in listed_records(results / name) if f"{PurePosixPath(name).parent}/{one}" not in found
        ]:
            raise ValueError(f"{results / name} lists {missing[0]}, which is not there: run its stage again.")
    return found


def stage_files(results: Path) -> dict[str, bytes]:
    """The files below ``results/<experiment>`` that stages wrote, as they are."""
    paths = [(path.relative_to(results).as_posix(), path) for path in sorted(results.rglob("*"))]
    return {name: path.read_bytes() for name, path in paths if _PACKED.fullmatch(name) and path.is_file()}


def check(results: Path, files: Mapping[str, bytes], origin: Mapping[str, Any]) -> None:
    """Refuse records that are not what a stage wrote, those of another scale or protocol, and two of one run.

    Raises:
        ValueError: naming the file.
    """
    for name, content in files.items():
        if name.endswith(".json") and not is_list(name):
            check_record(results / name, record := json.loads(content))
            for key in ("protocol", "scale") if name.startswith(("runs/", "search/")) else ():
                if record["run"][key] != origin["parts"][key]:
                    raise ValueError(
                        f"{results / name} is of {key} {record['run'][key]!r}, experiments/{origin['file']}.yaml names "
                        f"{origin['parts'][key]!r}: give the experiment that it is of, or move it away."
                    )
    twice = [run for run, count in Counter(filter(None, map(run_of, files))).items() if count > 1]
    if twice:
        raise ValueError(f"{results / twice[0]}-*.json: two records of one run; its stage, run again, settles it.")


def write_archive(path: Path, origin: Mapping[str, Any], files: Mapping[str, bytes]) -> int:
    """Write files and what they are of; the same give the same bytes.

    Returns:
        The archive's size in bytes.

    Raises:
        ValueError: if it were larger than :data:`LIMIT`; with the sizes of its parts.
        OSError: if it can't be written.
    """
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = json.dumps({"format": _FORMAT, **origin, "files": sums}, indent=1, sort_keys=True).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, content in {MANIFEST: manifest, **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if (size := buffer.tell()) > LIMIT:
        parts = Counter[str]()
        for name, content in files.items():
            parts[name.partition("/")[0]] += len(content)
        told = ", ".join(f"{part} {bytes_ / 1e6:.1f} MB" for part, bytes_ in parts.most_common())
        raise ValueError(
            f"{path} would have {size / 1e6:.1f} MB, allowed: {LIMIT / 1e6:.0f} MB (before compression: {told}): pack "
            "experiments with fewer methods, tasks or seeds, one after the other."
        )
    write_atomically(path, buffer.getvalue())
    return size


def read_archive(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The origin and the files of an archive, nothing written: whole, unchanged, and each one that a stage writes.

    Raises:
        ValueError: if it is no such archive, damaged, too large, lacks a file, or holds another.
    """
    if not path.is_file():
        raise ValueError(f"there is no archive {path}; give ARCHIVE=FILE, written by make pack.")
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size / 1e6:.1f} MB; an archive of make pack has at most 16 MB.")
    try:
        files = dict(_members(path))
        manifest = json.loads(files.pop(MANIFEST))
        sums = manifest.pop("files")
        if manifest.pop("format") != _FORMAT:
            raise ValueError(f"{path} is of another format than this code writes ({_FORMAT}): pack it with this code.")
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged, or no archive of make pack ({error}): copy or pack it again.") from None
    if missing := sorted(sums.keys() - files):
        raise ValueError(f"{path} lacks {missing[0]}: copy or pack it again.")
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != sums.get(name):
            fault = "is not what was packed" if name in sums else "is in no list of what was packed"
            raise ValueError(f"{path}: {name} {fault}: copy or pack it again.")
    return manifest, files


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every member: a regular file of a name that a stage writes, so that none can land anywhere else."""
    seen, total = set(), 0
    with tarfile.open(path, "r:xz") as archive:
        for member in archive:
            if not member.isreg() or (member.name != MANIFEST and not _PACKED.fullmatch(member.name)):
                raise ValueError(f"{path} holds {member.name!r}, which is no file that a stage writes: it is not used.")
            total += member.size
            if member.name in seen or total > _UNPACKED:
                fault = "twice" if member.name in seen else f"of {total / 1e6:.0f} MB and more, unpacked"
                raise ValueError(f"{path} holds {member.name!r} {fault}: it is not used.")
            seen.add(member.name)
            file = archive.extractfile(member)
            yield member.name, file.read() if file else b""
