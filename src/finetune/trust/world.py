"""A tiny experiment in a folder of its own, run once unbroken: what kills and faults are compared with."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.store.experiment import write_params
from finetune.store.records import PROJECT, write_json
from finetune.trust import driver
from finetune.trust.compare import files_below, moving

SEARCH = "search"
"""Not a stage of DVC: train does it first. Here it is one of its own."""


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline.

    Attributes:
        name: as DVC calls it.
        words: script and arguments.
        deps, outs: files and folders that it reads and writes.
        events: calls that change files in an unbroken run.
        seconds: of an unbroken run.
        moving: paths of values that differ between two unbroken runs (times); see :mod:`finetune.trust.compare`.
    """

    name: str
    words: tuple[str, ...]
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    events: tuple[str, ...] = ()
    seconds: float = 0.0
    moving: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What it does; for a decoder too, where encoders have it."""
        kind = self.name.partition("@")[0]
        return f"{kind} decoder" if "llama" in self.name and kind not in ("answers", "judgments") else kind


@dataclass(frozen=True)
class World:
    """The folder after its stages have run, and the stages in their order."""

    folder: Path
    stages: tuple[Stage, ...]

    def copy(self, target: Path, stage: Stage, *, done: bool) -> Path:
        """A copy of the folder before a stage has run, or after it."""
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.folder, target, symlinks=True)
        if not done:
            for out in stage.outs:
                path = target / out
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        return target


def build_world(folder: Path, experiment: Mapping[str, Any], sizes: Mapping[str, Any], limit: float) -> World:
    """Copy the project's configuration and scripts, run every stage of an experiment twice, and remember it.

    Args:
        folder: for the world; a finished one is taken as it is.
        experiment: content of an experiment file.
        sizes: file of ``conf`` -> values to set in it.
        limit: seconds for a stage.

    Raises:
        ValueError: if a stage fails.
    """
    note = folder.with_suffix(".json")
    if note.is_file():
        stages = json.loads(note.read_text())["stages"]
        lists = ("words", "deps", "outs", "events", "moving")
        return World(folder, tuple(Stage(**one | {key: tuple(one[key]) for key in lists}) for one in stages))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _lay(folder, experiment, sizes)
    done = []
    for stage in stages_of(folder):
        first = driver.run(folder, stage.words, limit=limit)
        if first.code:
            raise ValueError(f"{stage.name} fails without any fault: {first.err[-800:]}")
        before = World(folder, ()).copy(folder.with_name("again"), stage, done=False)
        second = driver.run(before, stage.words, limit=limit)
        found = moving(folder, before, stage.outs) if not second.code else ()
        facts = {"events": second.events, "seconds": second.seconds, "moving": tuple(found)}
        done.append(Stage(**asdict(stage) | facts))
    shutil.rmtree(folder.with_name("again"), ignore_errors=True)
    write_json(note, {"stages": [asdict(stage) for stage in done]})
    return World(folder, tuple(done))


def _lay(folder: Path, experiment: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Configuration, scripts and the experiment's lists."""
    for name in ("conf", "experiments"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "dvc.yaml", folder)
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
    for name, changes in sizes.items():
        path = folder / "conf" / name
        path.write_text(yaml.safe_dump(_merged(yaml.safe_load(path.read_text()), changes), sort_keys=False))
    source = folder / "experiments" / f"{experiment['name']}.yaml"
    source.write_text(yaml.safe_dump({key: value for key, value in experiment.items() if key != "name"}))
    write_params(source, folder / "params.yaml", folder / "conf")


def _merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(content)
    for key, value in changes.items():
        merged[key] = _merged(content[key], value) if isinstance(value, Mapping) and key in content else value
    return merged


def stages_of(folder: Path) -> list[Stage]:
    """The stages of a folder's dvc.yaml in an order that can be run; besides each encoder's search, and the plan."""
    from dvc.repo import Repo

    found = []
    with Repo(str(folder)) as repo:
        stages: Any = repo.index.stages
        for one in stages:
            words = tuple(shlex.split(one.cmd.replace("workers=auto", "workers=1")))[1:]
            deps = tuple(dict.fromkeys(dep.def_path for dep in one.deps if dep.protocol == "local"))
            stage = Stage(one.name, words, tuple(d for d in deps if d), tuple(out.def_path for out in one.outs))
            if searched := [out for out in stage.outs if f"/{SEARCH}/" in out]:
                name = stage.name.replace("train", SEARCH, 1)
                found.append(Stage(name, (f"experiments/{SEARCH}.py", *words[1:]), stage.deps, tuple(searched)))
            found.append(stage)
    name = Path(found[-1].outs[0]).parts[1]
    inputs = (f"experiments/{name}.yaml", "experiments/base.yaml", "conf/plan.yaml")
    words = ("experiments/plan.py", f"experiment={inputs[0]}")
    return [*_in_order(found), Stage(f"plan@{name}", words, inputs, (f"outputs/plan/{name}.json",))]


def _in_order(stages: Sequence[Stage]) -> list[Stage]:
    """What is read stands behind what writes it."""
    left, order, made = list(stages), [], set()
    while left:
        waiting = {out for stage in left for out in stage.outs} - made
        ready = [s for s in left if not any(_touch(dep, out) for dep in s.deps for out in waiting - {*s.outs})]
        if not ready:
            raise ValueError(f"stages wait for each other: {[stage.name for stage in left]}")
        order += ready
        made |= {out for stage in ready for out in stage.outs}
        left = [stage for stage in left if stage not in ready]
    return order


def _touch(dep: str, out: str) -> bool:
    return f"{out}/".startswith(f"{dep}/") or f"{dep}/".startswith(f"{out}/")


def one_of_each(folder: Path, places: Sequence[str]) -> dict[str, list[Path]]:
    """Files below some places by what they are: ``runs/*/*/cell.json``, the first of each first."""
    found: dict[str, list[Path]] = {}
    for place in places:
        for path in files_below(folder, [place]):
            name = re.sub(r"[0-9a-f]{12}|\d+|\b(cola|mrpc|full|lora|meprop|sparsegrad|validation|train)\b", "*", path)
            found.setdefault(name, []).append(folder / path)
    return found
