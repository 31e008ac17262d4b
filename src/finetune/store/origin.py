"""Where records come from: the experiment, all that its files configure, the versions of the code, the commit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.store.catalog import CONF
from finetune.store.checks import config_hash
from finetune.store.experiment import load
from finetune.store.files import read_yaml
from finetune.store.records import PROJECT, git, provenance

_NO_CHOICES = ("stages", "tables", "figures", "stands_for", "launch", "workers")
"""Of an experiment: what decides no record."""


def origin_of(experiment: str | Path, conf: Path = CONF) -> dict[str, Any]:
    """What an archive says of itself: experiment and its file, configuration (a hash) and parts, versions, commit.

    Args:
        experiment: a file of ``experiments/``.
        conf: the configuration's folder.

    Raises:
        ValueError: as :func:`finetune.store.experiment.load`.
    """
    given = load(experiment, conf)
    files = {f"conf/{name}.yaml": read_yaml(conf / f"{name}.yaml") for name in sorted({*_files(given, conf)})}
    parts = {key: value for key, value in given.items() if key not in _NO_CHOICES}
    parts |= {name: config_hash(content) for name, content in files.items() if name != "conf/base.yaml"}
    code = provenance()
    return {
        "file": Path(experiment).stem,
        "experiment": given["name"],
        "configuration": config_hash(parts),
        "parts": parts,
        "versions": {name: content["version"] for name, content in files.items() if "version" in content},
        "commit": code["commit"],
        "dirty": code["dirty"],
    }


def _files(given: Mapping[str, Any], conf: Path) -> Iterator[str]:
    """The files of ``conf`` that decide an experiment's records."""
    yield "base"
    stages = given["stages"]
    for entry in [*stages["bases"].values(), *stages["train"].values()]:
        yield from (entry["problem"], entry["data"], f"model/{entry['model']}")
        yield from (f"protocol/{entry['protocol']}", f"scale/{entry['scale']}")
        yield from (f"method/{entry['method']}" for _ in range("method" in entry))
    if given["decoders"]:
        yield from ("mt_bench", f"judge/{given['judge']}", f"questions/{given['questions']}")
    for name in ("efficiency", "energy", "hosvd_cost", "cost_curves"):
        yield from (name, f"scale/{name}/{given['measurements']}")


def check_origin(path: Path, there: Mapping[str, Any], here: Mapping[str, Any], accepted: str | None = None) -> None:
    """Refuse what is of another version, configuration or commit than this checkout.

    Args:
        path: named in an error.
        there: what the archive says of itself.
        here: :func:`origin_of` of the experiment.
        accepted: beginning of a commit that counts as this one.

    Raises:
        ValueError: saying which differs.
    """
    for key, what in (("versions", "version"), ("parts", "configuration")):
        names = sorted({*there[key], *here[key]})
        if other := [name for name in names if there[key].get(name) != here[key].get(name)]:
            (first, *more), values = other, [side[key].get(other[0]) for side in (there, here)]
            also = f" (and of {', '.join(more)})" if more else ""
            raise ValueError(
                f"{path} is of another {what} of {first}: {values[0]}, here {values[1]}{also}: check out "
                f"{there['commit']}, which packed it, or pack it again."
            )
    commit = there["commit"]
    if accepted and len(accepted) >= 7 and (commit or "unknown").startswith(accepted):
        return
    if commit is None or there["dirty"] or not _is_same_code(commit, here["commit"]):
        said = f"commit {commit}" + " with changes" * bool(there["dirty"]) if commit else "an unknown commit"
        raise ValueError(
            f"{path} is of {said}, here is {here['commit']}, and src or conf may differ: check it out, or "
            f"take it as the same by COMMIT={(commit or 'unknown')[:12]}."
        )


def _is_same_code(there: str, here: str | None) -> bool:
    """Whether two commits are one, or have the same code and configuration."""
    known = re.fullmatch("[0-9a-f]{40}", there)  # else it might be an option of git
    return there == here or bool(known and git(PROJECT, "diff", "--quiet", there, "--", "src", "conf") is not None)
