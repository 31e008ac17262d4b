"""Compare an experiment's results with those of another commit, number by number: tables, statistics, figures.

python experiments/compare_results.py local
python experiments/compare_results.py local --commit main --allow '^figures/'

Prints what differs, is new or is gone; ends with 1 if a number or a verdict differs or is gone, new ones are no fault.
"""

import argparse
import csv
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.store.boundary import exit_with_message

START = "15c3c2b"
"""The commit before the project was put in order."""

FILES = re.compile(r"(tables/table_\d+\.csv|statistics\.json|figures/[^/]+\.json)")
COLUMNS = ("ours", "ours_low", "ours_high", "n", "paper", "paper_std", "released", "verdict")
"""Columns of a table's CSV that are compared."""

NAMES = ("name", "model", "table", "row", "method", "first", "second", "task")
"""Fields by which an entry of a list is known, whatever its place."""

SAMPLED = r"/(p|p_holm|least)$"
"""p-values from sampled sign patterns, and the least of them: another sampler moves their third digit."""

MOVED = (
    (r"^statistics\.json/decoder/methods/(\w+)/share$", r"statistics.json/decoders/MODEL/shares/\1"),
    (
        r"^statistics\.json/decoder/methods/(\w+)/loss/",
        r"statistics.json/decoders/MODEL/comparison/methods/\1/tasks/oasst1/",
    ),
    (
        r"^statistics\.json/decoder/families/([^/]+)/pairs/([^/]+)/(difference|p|p_holm)",
        r"statistics.json/decoders/MODEL/comparison/families/\1/pairs/\2/mean/\3",
    ),
)
"""Where numbers of `START` stand now; MODEL is the decoder of that time."""


GONE = (r"^statistics\.json/decoder/families/.*/seeds/",)
"""What `START` listed and is counted now: the seeds of a pair."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--commit", default=START)
    parser.add_argument("--tolerance", type=float, default=1e-9, help="largest relative difference of two numbers")
    parser.add_argument("--sampled", type=float, default=0.01, help="largest difference of two sampled p-values")
    parser.add_argument("--allow", action="append", default=[*GONE], help="pattern of paths that may differ or be gone")
    args = parser.parse_args()
    folder = f"results/{args.experiment}"
    old, new = committed(args.commit, folder), present(folder)
    if not old or not new:
        print(f"error: nothing to compare: {len(old)} values at {args.commit}, {len(new)} in {folder}", file=sys.stderr)
        return 2
    gone = [path for path in old if path not in new]
    changed = [path for path in old if path in new and not same(old[path], new[path], args.tolerance)]
    drawn = [path for path in changed if re.search(SAMPLED, path) and same_p(old[path], new[path], args.sampled)]
    faults = []
    for title, paths in (("gone", gone), ("differs", [path for path in changed if path not in drawn])):
        for path in paths:
            allowed = any(re.search(pattern, path) for pattern in args.allow)
            faults += [] if allowed else [path]
            print(f"{title}{', allowed' if allowed else ''}: {path}: {old[path]} -> {new.get(path, 'nothing')}")
    for path in drawn:
        print(f"sampled: {path}: {old[path]:.6g} -> {new[path]:.6g}")
    print(
        f"{len(old)} values at {args.commit}: {len(old) - len(gone) - len(changed)} the same, {len(drawn)} sampled "
        f"p-values moved, {len(gone) + len(changed) - len(drawn)} differ or are gone ({len(faults)} not allowed), "
        f"{len(new.keys() - old.keys())} new"
    )
    return 1 if faults else 0


def committed(commit: str, folder: str) -> dict[str, Any]:
    """Path -> value of what a commit holds, under the paths of today."""
    names = _git("ls-tree", "-r", "--name-only", commit, f"{folder}/").splitlines()
    names = [name.removeprefix(f"{folder}/") for name in names]
    found = {}
    for name in names:
        if FILES.fullmatch(name):
            found |= values(name, _git("show", f"{commit}:{folder}/{name}"))
    model = next((value for path, value in found.items() if path == "statistics.json/decoder/model"), "")
    for pattern, place in MOVED:
        found = {re.sub(pattern, place.replace("MODEL", str(model)), path): value for path, value in found.items()}
    return {path: value for path, value in found.items() if _compared(path, value)}


def present(folder: str) -> dict[str, Any]:
    """Path -> value of what lies in the working tree."""
    names = sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    found = {}
    for name in names:
        if FILES.fullmatch(name):
            found |= values(name, (Path(folder) / name).read_text(encoding="utf-8"))
    return {path: value for path, value in found.items() if _compared(path, value)}


def values(name: str, text: str) -> dict[str, Any]:
    """Path -> value of one file: the cells of a CSV by row and column, the leaves of a JSON by their keys."""
    if not name.endswith(".csv"):
        return dict(_leaves(json.loads(text), name))
    cells = {}
    for row in csv.DictReader(text.splitlines()):
        for column in COLUMNS:
            cells[f"{name}/{row['row']}/{row['column']}/{column}"] = _parsed(row[column])
    return cells


def same(first: Any, second: Any, tolerance: float) -> bool:
    """Whether two values are the same: numbers within a relative tolerance, all else exactly."""
    if not _is_number(first) or not _is_number(second):
        return first == second and type(first) is type(second)
    return math.isclose(first, second, rel_tol=tolerance, abs_tol=tolerance * 1e-3)


def same_p(first: Any, second: Any, tolerance: float) -> bool:
    """Whether two values are p-values within sampling error."""
    return _is_number(first) and _is_number(second) and abs(first - second) <= tolerance


def _leaves(content: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _leaves(value, f"{path}/{key}")
    elif isinstance(content, list):
        for place, value in enumerate(content):
            names = [str(value[name]) for name in NAMES if name in value] if isinstance(value, dict) else []
            yield from _leaves(value, f"{path}/{' - '.join(names) or place}")
    else:
        yield path, content


def _compared(path: str, value: Any) -> bool:
    """Numbers, and the cells of tables with their verdicts; texts may be said in other words."""
    return path.startswith("tables/") or (_is_number(value) and not path.endswith("/schema"))


def _parsed(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
