"""What kills and faults share: the world, the trials side by side, the outcomes so far, the record's head."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.runs.workers import Workers, run_all
from finetune.store import records
from finetune.store.files import write_atomically
from finetune.trust import driver
from finetune.trust.compare import BAD, GOOD
from finetune.trust.world import Stage, World, build_world

Trial = Mapping[str, Any]
One = Callable[[Path, float, Trial], dict[str, Any]]


@dataclass(frozen=True)
class Campaign:
    """One campaign.

    Attributes:
        config: composed configuration, as plain values.
        name: ``kills`` or ``faults``.
        world: the unbroken experiment.
        kinds: kind of stage -> its stages, those that are asked for.
        work: folder of copies and outcomes.
    """

    config: Mapping[str, Any]
    name: str
    world: World
    kinds: Mapping[str, Sequence[Stage]]
    work: Path

    @property
    def record(self) -> Path:
        """Where the record goes."""
        return Path(self.config["output"]) / f"{self.name}.json"

    def each(
        self, trials: Sequence[Trial], one: Callable[[Path, float, Trial], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Do the trials that have no outcome yet; all, in their order, each with what was seen of it.

        Args:
            trials: plain values.
            one: gets a folder for its copy, the limit in seconds, and the trial.
        """
        folder = self.work / self.name
        jobs = [partial(_once, folder, one, self.config["limit"], trial) for trial in trials]
        workers = _workers(self.config)
        return run_all(jobs, workers, label=self.name, bar=self.config["progress"])

    def show(self) -> None:
        """Put a table of both records into the page, in the place of the one below the mark ``<!-- trust -->``."""
        if self.config["page"] is None:
            return
        page = Path(self.config["page"])
        before, mark, rest = page.read_text().partition("<!-- trust -->\n")
        if not mark:
            raise ValueError(f"{page} has no line <!-- trust --> for the table: add it, or set page=null.")
        places = {name: self.record.with_name(f"{name}.json") for name in ("kills", "faults")}
        totals = {name: records.read_json(path)["totals"] for name, path in places.items() if path.is_file()}
        rest = "".join(itertools.dropwhile(lambda line: line.startswith("|"), rest.splitlines(keepends=True)))
        write_atomically(page, before + mark + table(totals) + rest)

    def header(self) -> dict[str, Any]:
        """The head of the record: code, machine, settings, and what is not compared."""
        shown = ("seed", "limit", "slow", self.name, "experiment", "sizes")
        moving = sorted({path for stage in self.world.stages for path in stage.moving})
        return {
            "schema": 1,
            "status": "finished",
            "settings": {name: self.config[name] for name in shown} | {"stages": self.config["stages"]},
            "moving": moving,
            "provenance": records.provenance() | {"cores": len(os.sched_getaffinity(0))},
        }


def table(totals: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of the totals of ``kills`` and of ``faults``: a row each stage, a column each outcome."""
    rows: dict[str, Counter[str]] = {}
    for name, found in totals.items():
        for stage, outcomes in found["stages" if name == "kills" else "by_stage"].items():
            row = rows.setdefault(stage.partition(" ")[0], Counter())
            row.update({name: sum(outcomes.values())})
            row.update({f"{name} {outcome}": number for outcome, number in outcomes.items()})
    columns = {"kills": "kills, pairs", "kills same": "then the same", "faults": "faults"}
    columns |= {f"faults {outcome}": outcome for outcome in (*GOOD, *BAD)}
    seen = sorted({key for row in rows.values() for key in row} - {*columns})
    columns |= {key: f"{key.partition(' ')[2]} after a kill" for key in seen}
    whole = sum(rows.values(), Counter())
    lines = [["stage", *columns.values()], ["---"] * (1 + len(columns))]
    lines += [[stage, *(str(row[key]) for key in columns)] for stage, row in [*rows.items(), ("all", whole)]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def prepare(config: Mapping[str, Any], name: str) -> Campaign:
    """The world of a campaign, built or found, and what is asked for.

    Raises:
        ValueError: if a stage fails without any fault, or a kind of stage is unknown.
    """
    made = records.provenance()
    identity = {key: config[key] for key in ("experiment", "sizes")} | {key: made[key] for key in ("commit", "dirty")}
    work = Path(config["work"]).absolute() / records.config_hash(identity)
    if config["fresh"]:
        shutil.rmtree(work, ignore_errors=True)
    if not (work / "world.json").is_file():
        driver.preload()
    world = build_world(work / "world", config["experiment"], config["sizes"], config["limit"])
    kinds: dict[str, list[Stage]] = {}
    for stage in world.stages:
        kinds.setdefault(stage.kind, []).append(stage)
    wanted = config["stages"] or list({kind.partition(" ")[0]: None for kind in kinds})
    if unknown := [kind for kind in wanted if not any(kind in (k, k.partition(" ")[0]) for k in kinds)]:
        raise ValueError(f"stages: {', '.join(unknown)}; allowed: {', '.join(kinds)}.")
    chosen = {k: found for k, found in kinds.items() if k in wanted or k.partition(" ")[0] in wanted}
    return Campaign(config, name, world, chosen, work)


def _workers(config: Mapping[str, Any]) -> Workers:
    return Workers.of({"workers": config["workers"], "device": "cpu", "threads": 1})


def _once(folder: Path, one: One, limit: float, trial: Trial) -> dict[str, Any]:
    """A trial, unless its outcome is there."""
    digest = records.config_hash(trial)
    path, place = folder / f"{digest}.json", folder / digest
    if path.is_file():
        return records.read_json(path)
    driver.preload()
    content = {**trial, **one(place, limit, trial)}
    records.write_json(path, content)
    shutil.rmtree(place, ignore_errors=True)
    for suffix in (".out", ".err", ".events"):
        Path(f"{place}{suffix}").unlink(missing_ok=True)
    return content
