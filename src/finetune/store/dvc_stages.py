"""Stages of DVC whose results came in an archive: done, where they are complete and what they are made from is here."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.store.catalog import CONF
from finetune.store.files import read_yaml
from finetune.store.records import read_record

log = logging.getLogger(__name__)


def commit_complete(lists: Mapping[str, Any]) -> list[str]:
    """Let DVC take the complete stages of an experiment as done, as they lie here; nothing of them is run.

    A stage whose model, data or bases are not here yet is named and left. Merged models do not travel: a decoder's
    stage counts without them.

    Args:
        lists: the experiment, expanded, as ``params.yaml`` holds it.

    Returns:
        The stages' names.
    """
    from dvc.repo import Repo

    results = Path("results") / lists["name"]
    complete = {stage for stage, files in _wanted(lists) if all(_is_there(results, name) for name in files)}
    for entry in lists["stages"]["train"].values():  # DVC asks for the folder, and training makes it
        if f"train@{lists['name']}-{entry['model']}-{entry['method']}" in complete:
            (results / entry["kept"] / entry["model"] / entry["method"]).mkdir(parents=True, exist_ok=True)
    with Repo() as repo:
        ready = [stage.addressing for stage in repo.index.stages if all(dep.exists for dep in stage.deps)]
        done = [name for name in ready if name in complete]
        for name in done:
            repo.commit(name, force=True)
    log.info("done for dvc: %s", ", ".join(done) or "none")
    if left := sorted(complete - {*done}):
        log.info(
            "complete, but their data, models or bases are not here: make them (dvc repro basis), unpack again: %s",
            ", ".join(left),
        )
    return done


def _wanted(lists: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Each stage that an archive may complete, and the records that it needs, as patterns."""
    stages, name = lists["stages"], lists["name"]
    for key, cell in stages["train"].items():
        place = f"runs/{cell['model']}/{cell['method']}"
        runs = [(task, seed) for task in cell["tasks"] for seed in cell["seeds"]]
        yield f"train@{key}", [f"{place}/cell.json", *(f"{place}/{task}-seed{seed}-*.json" for task, seed in runs)]
    for key, cell in stages["answers"].items():
        model = cell["model"]
        runs = [(method, f"{model}-{method}-seed{seed}") for method in cell["methods"] for seed in cell["seeds"]]
        for kind in ("answers", "judgments"):
            yield f"{kind}@{key}", [f"mt_bench/{kind}/{model}/{method}/{one}.json" for method, one in runs]
    for key, cell in stages["efficiency"].items():
        yield f"efficiency@{key}", [f"efficiency/{cell['model']}/{task}.json" for task in cell["tasks"]]
    for key, cell in stages["energy"].items():
        followed = read_yaml(CONF / "scale" / "energy" / f"{lists['measurements']}.yaml")["trajectories"]
        pairs = [f"{task}-{one}" for task in cell["tasks"] for one in followed]
        yield f"energy@{key}", [f"energy/{cell['model']}/{pair}.json" for pair in pairs]
    for stage in ("hosvd_cost", "cost_curves"):
        yield f"{stage}@{name}", [f"{stage}.json"]


def _is_there(results: Path, pattern: str) -> bool:
    """Whether a record is here, sound, and its run did not fail."""
    found = list(results.glob(pattern))
    if pattern.endswith("cell.json") or not found:
        return bool(found)
    try:
        return all(read_record(path).get("status", "finished") == "finished" for path in found)
    except ValueError:
        return False
