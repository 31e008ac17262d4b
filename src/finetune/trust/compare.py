"""Two folders of results value by value, and what a fault came to.

A file's values are its JSON leaves, the lines of a JSONL file, the tensors and metadata of a safetensors file, the
numbers of a page; of any other file its whole content. Times and machines are left out by name, and besides what
differs between two unbroken runs. Places in lists count as one, so that one moving time means all of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.trust.driver import Outcome

NAMED = re.compile(
    r"/(provenance|seconds|step_seconds_median|created|memory|resumed|platform|host|warnings|load_average|maps_sha256)(/|$)"
)
"""Times and warnings of them, machines, how often a run was taken up again; a file's bytes where its tensors count."""

PASSED = re.compile(r"(^|/)outputs/hydra/|\.lock$|\.journal$")
"""Files that are compared by what is made from them: a journal holds times, a lock nothing."""

PAGES = (".html", ".md", ".csv", ".tex", ".svg")
IDENTITY = re.compile(r"(hash|sha256|digest|fingerprint|schema|version)")
"""Names of values that say that something else was run."""
OWN = ("/sha256", "/checksum")
"""Those that only say that a file is whole."""

REFUSED, REDONE, HARMLESS, SAID = "refused in one line", "redone", "harmless", "said in the record"
WRONG, TRACEBACK, HANG = "SILENTLY WRONG", "traceback", "hang"
GOOD = (REFUSED, REDONE, HARMLESS, SAID)
BAD = (WRONG, TRACEBACK, HANG)


def files_below(folder: Path, places: Sequence[str] = (".",)) -> list[str]:
    """Files at and below places of a folder, relative to it, in order; locks and Hydra's own left out."""
    found = set()
    for place in places:
        path = folder / place
        paths = path.rglob("*") if path.is_dir() else [path]
        found |= {one.relative_to(folder).as_posix() for one in paths if one.is_file() or one.is_symlink()}
    return sorted(name for name in found if not re.search(r"(^|/)outputs/hydra/|\.lock$|__pycache__|^\.dvc/", name))


def values(path: Path) -> dict[str, Any]:
    """A file's values by path; a file that its name belies is one value."""
    content = path.read_bytes()
    try:
        if path.suffix == ".json":
            return dict(_leaves(json.loads(content), ""))
        if path.suffix == ".jsonl":
            return dict(_leaves([json.loads(line) for line in content.splitlines()], ""))
        if path.suffix == ".safetensors":
            return dict(_tensors(content))
        if path.suffix in PAGES:
            return {"/numbers": re.findall(r"\d+(?:\.\d+)?", content.decode())}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return {"": hashlib.sha256(content).hexdigest()}


def _leaves(content: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _leaves(value, f"{path}/{key}")
    elif isinstance(content, list) and content:
        for place, value in enumerate(content):
            yield from _leaves(value, f"{path}/{place}")
    else:
        yield path, repr(content)


def _tensors(content: bytes) -> Iterator[tuple[str, Any]]:
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for key, value in header.pop("__metadata__", {}).items():
        try:
            yield from _leaves(json.loads(value), f"/{key}")
        except ValueError:
            yield f"/{key}", value
    for name, facts in header.items():
        start, end = facts["data_offsets"]
        yield f"/tensors/{name}", (facts["shape"], facts["dtype"], hashlib.sha256(data[start:end]).hexdigest())


def differences(right: Path, found: Path, places: Sequence[str], moving: Sequence[str] = ()) -> dict[str, list[str]]:
    """What differs below some places: file -> paths of its values; ``missing`` and ``new`` for whole files.

    Hidden files that are new are none of it: see :func:`left_over`.

    Args:
        right: folder of the unbroken run.
        found: folder that is compared with it.
        places: files and folders, relative.
        moving: paths of :func:`moving`, left out.
    """
    left_out, result = set(moving), {}
    there, here = ({*files_below(folder, places)} for folder in (right, found))
    for name in sorted(there | here):
        if PASSED.search(name) or (name not in there and "/." in name):
            continue
        if name not in here or name not in there:
            result[name] = ["missing" if name not in here else "new"]
            continue
        if (right / name).read_bytes() == (found / name).read_bytes():
            continue
        first, second = values(right / name), values(found / name)
        paths = [path for path in {**first, **second} if first.get(path) != second.get(path)]
        kept = [path for path in paths if not NAMED.search(path) and _place(name, path) not in left_out]
        result |= {name: kept} if kept else {}
    return result


def of_numbers(right: Path, found: Path, differing: dict[str, list[str]], name: str) -> dict[str, list[str]]:
    """The differences without those in words of one JSON file."""
    if name not in differing or Path(name).suffix not in (".json", ".jsonl") or not (found / name).is_file():
        return differing
    first, second = values(right / name), values(found / name)
    number = re.compile(r"-?[\d.]+(e[+-]?\d+)?|None|True|False")
    pairs = {path: (first.get(path, ""), second.get(path, "")) for path in differing[name]}
    kept = [path for path, pair in pairs.items() if path in ("", "missing", "new") or any(map(number.fullmatch, pair))]
    return {key: paths for key, paths in (differing | {name: kept}).items() if paths}


def moving(first: Path, second: Path, places: Sequence[str]) -> list[str]:
    """``file#path`` of values that differ between two unbroken runs."""
    found = differences(first, second, places)
    return sorted({_place(name, path) for name, paths in found.items() for path in paths})


def _place(name: str, path: str) -> str:
    return re.sub(r"\b\d+(\.\d+)?\b|[0-9a-f]{12}", "*", f"{name}#{path}")


def left_over(right: Path, found: Path) -> list[str]:
    """Files that an unbroken run does not leave."""
    there = {*files_below(right)}
    return [name for name in files_below(found) if name not in there]


def judge_rerun(outcome: Outcome, differing: dict[str, list[str]], left: Sequence[str]) -> str:
    """What a kill came to, from the run after it: ``same``, or what is wrong."""
    if outcome.hung:
        return HANG
    if outcome.code:
        return "refused" if _is_one_line(outcome) else TRACEBACK
    return "different" if differing else "files left" if left else "same"


def judge(outcome: Outcome, differing: dict[str, list[str]], *, mended: bool, found: Path) -> str:
    """What a fault came to.

    Args:
        outcome: of the process that met it.
        differing: what its outputs differ in from the unbroken run's.
        mended: whether the damaged file is whole again.
        found: folder of the outputs.
    """
    if outcome.hung:
        return HANG
    if outcome.code:
        return REFUSED if _is_one_line(outcome) else TRACEBACK
    if not differing:
        return REDONE if mended else HARMLESS
    return SAID if all(_says_so(found / name, paths, differing) for name, paths in differing.items()) else WRONG


def _is_one_line(outcome: Outcome) -> bool:
    """Whether a failed process says why, without a traceback."""
    return outcome.code > 0 and "Traceback (most recent call last)" not in outcome.err and bool(said(outcome.err))


def _says_so(path: Path, paths: list[str], differing: dict[str, list[str]]) -> bool:
    """Whether a file tells that it is of something else: by a value, or by the hash in its name."""
    if paths in (["missing"], ["new"]):
        stem = re.sub(r"[0-9a-f]{12}", "*", path.name)
        renamed = [n for n in differing if re.sub(r"[0-9a-f]{12}", "*", n.rpartition("/")[2]) == stem]
        return "*" in stem and len(renamed) > 1
    return any(IDENTITY.search(one) for one in paths if one not in OWN)


def said(err: str) -> str:
    """The error that a script's standard error ends with; empty if there is none."""
    lines = [line for line in err.strip().splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE) or "Could not" in line]
    return (errors or lines or [""])[-1].strip()
