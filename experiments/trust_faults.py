"""Give every stage damaged files, full disks, wrong options, strange surroundings, a bad judge; see what comes of it.

    python experiments/trust_faults.py                                 # writes results/trust/faults.json
    python experiments/trust_faults.py stages=[judgments] output=outputs/trust

The stages are those of a tiny experiment; see conf/trust.yaml. A rerun goes on where it was.
"""

import itertools
import json
import logging
import random
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from finetune.runs.command import script
from finetune.store import records
from finetune.trust import campaign, compare, damage, driver
from finetune.trust.compare import REFUSED, differences, judge, said
from finetune.trust.driver import Outcome, Trouble
from finetune.trust.endpoint import KEY, FaultyJudge
from finetune.trust.world import Stage, World, one_of_each

log = logging.getLogger(__name__)
SIZES = (10, 2000, 50_000)


def plan(world: World, kinds: Mapping[str, Sequence[Stage]], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The faults, as plain values."""
    found: list[dict[str, Any]] = []
    for kind, stages in kinds.items():
        draw = random.Random(f"{config['seed']} {kind}")
        few = min(1.0, config["slow"] / max(stage.seconds for stage in stages))
        number = max(6, round(config["faults"]["files"] * few))
        found += of_files(world, draw.choice(stages), draw)[:number]
        found += of_disk(draw.choice(stages), config["faults"]["full"], draw)
    for group in ("options", "surroundings"):
        for kind, entries in config["faults"][group].items():
            for entry in entries if kind in kinds else ():
                given = {"words": [entry]} if group == "options" else {"env": entry}
                found.append({"fault": group, "stage": kinds[kind][0].name, **given})
    if "judgments" in kinds:
        ways_of = itertools.product(FaultyJudge.REPLIES, ("always", "first"))
        stage = kinds["judgments"][0].name
        found += [{"fault": "endpoint", "stage": stage, "reply": reply, "when": when} for reply, when in ways_of]
    return found


def of_files(world: World, stage: Stage, draw: random.Random) -> list[dict[str, Any]]:
    """Damaged inputs and outputs of a stage in turn: each kind of file with each kind of fault, in a drawn order."""
    found: dict[str, list[dict[str, Any]]] = {"input": [], "output": []}
    for role, places in (("input", stage.deps), ("output", stage.outs)):
        for files in one_of_each(world.folder, places).values():
            for fault in damage.KINDS:
                path = draw.choice(files)
                if fault == "flipped" and path.suffix in (".yaml", ".txt"):  # may be meant, for all that one can tell
                    continue
                others = [one for one in files if one != path]
                others = others or [one for one in path.parent.iterdir() if one.suffix == path.suffix and one != path]
                other = str(draw.choice(others).relative_to(world.folder)) if others else None
                own = {"fault": fault, "file": str(path.relative_to(world.folder)), "role": role}
                found[role].append({"stage": stage.name, **own, "other": other, "seed": draw.randrange(2**16)})
    for faults in found.values():
        draw.shuffle(faults)
    pairs = itertools.zip_longest(found["input"], found["output"])
    return [fault for pair in pairs for fault in pair if fault is not None]


def of_disk(stage: Stage, points: int, draw: random.Random) -> list[dict[str, Any]]:
    """A full disk at some calls, files that may not grow, a read-only folder, no locks, an ASCII locale."""
    calls = sorted(draw.sample(range(len(stage.events)), min(points, len(stage.events))))
    troubles = [Trouble("full", at) for at in calls] + [Trouble("large", draw.choice(SIZES))]
    troubles += [Trouble("readonly", place=place) for place in ("results", "outputs")]
    troubles += [Trouble("flock"), Trouble("locale")]
    return [{"fault": one.kind, "stage": stage.name, "trouble": asdict(one)} for one in troubles]


def one_fault(world: World, folder: Path, limit: float, fault: Mapping[str, Any]) -> dict[str, Any]:
    """Make the fault, run the stage, and say what came of it."""
    stage = next(one for one in world.stages if one.name == fault["stage"])
    if fault["fault"] == "endpoint":
        return endpoint(world, folder, stage, limit, fault)
    world.copy(folder, stage, done=fault.get("role") == "output")
    done, env, words = None, dict(fault.get("env", {})), [*stage.words, *fault.get("words", [])]
    if "file" in fault:
        other = None if fault["other"] is None else folder / fault["other"]
        path, draw = folder / fault["file"], random.Random(fault["seed"])
        done = damage.damage(path, fault["fault"], draw, other=other, root=folder)
        if done is None:
            return {"outcome": "does not apply"}
    outcome = driver.run(folder, words, Trouble(**fault.get("trouble", {})), limit=limit, env=env)
    differing = differences(world.folder, folder, _compared(stage, fault), stage.moving)
    if fault.get("role") == "output":  # a word of a record that no table reads is no number
        differing = compare.of_numbers(world.folder, folder, differing, fault["file"])
    mended = fault.get("role") == "output" or fault["fault"] in ("flock", "locale", "surroundings")
    found = judge(outcome, differing, mended=mended, found=folder)
    if "trouble" in fault and found == REFUSED:  # the disk has room again
        outcome_after = driver.run(folder, words, limit=limit, env=env)
        differing = differences(world.folder, folder, stage.outs, stage.moving)
        after = judge(outcome_after, differing, mended=True, found=folder)
        found, outcome = (found, outcome) if after == compare.REDONE else (after, outcome_after)
    if fault["fault"] == "options" and outcome.code == 0:  # it was to be refused
        found = compare.WRONG
    if (folder / damage.MARKER).exists():
        found, differing = compare.WRONG, {"unpickled": [damage.MARKER]}
    return {"outcome": found, **({"done": done} if done else {}), **_shown(outcome, differing)}


def _compared(stage: Stage, fault: Mapping[str, Any]) -> list[str]:
    """The outputs; files that the fault put there by hand are inputs."""
    return [out for out in stage.outs if out != fault.get("file") or fault["role"] == "output"]


def _shown(outcome: Outcome, differing: Mapping[str, list[str]]) -> dict[str, Any]:
    """What the record keeps of a process."""
    shown: dict[str, Any] = {"code": outcome.code, "seconds": round(outcome.seconds, 2)}
    if outcome.code:
        shown["said"] = said(outcome.err)[:300]
    if "Traceback (most recent call last)" in outcome.err and outcome.code:
        shown |= {"said": outcome.err.strip().splitlines()[-1][:300], "traceback": _where(outcome.err)}
    if differing and not outcome.code:
        shown["differences"] = {name: paths[:4] for name, paths in list(differing.items())[:6]}
    return shown


def _where(err: str) -> list[str]:
    """Places of the project's own code in a traceback."""
    places = re.findall(r'File "[^"]*?((?:src|experiments)/[^"]+)", line (\d+)', err)
    return [f"{file}:{line}" for file, line in places][-5:]


def endpoint(world: World, folder: Path, stage: Stage, limit: float, fault: Mapping[str, Any]) -> dict[str, Any]:
    """Judge by an endpoint that answers badly, and compare its ratings with those of one that answers well."""
    found = {}
    for reply in ("good", fault["reply"]):
        own = world.copy(folder.with_name(f"{folder.name}-{reply == 'good'}"), stage, done=False)
        with FaultyJudge(reply, fault["when"]) as server:
            words = [*stage.words, "judge=openai", f"judge.base_url={server.base_url}", "judge.max_retries=1"]
            words += ["judge.timeout=1", "judge.api_key_env=TRUST_KEY", "methods=[full]"]
            outcome = driver.run(own, words, limit=limit, env={"TRUST_KEY": KEY})
        found[reply == "good"] = own, outcome
    (right, first), (folder_, outcome) = found[True], found[False]
    if first.code:
        return {"outcome": compare.TRACEBACK, **_shown(first, {})}
    differing = differences(right, folder_, stage.outs, stage.moving)
    rated = {
        name: [p for p in paths if p.rpartition("/")[2] in ("score", "rating")] for name, paths in differing.items()
    }
    rated = {name: paths for name, paths in rated.items() if paths}
    verdict = judge(outcome, rated, mended=True, found=folder_)
    texts = [path.read_bytes() for path in folder_.rglob("*") if path.is_file()]
    if any(KEY.encode() in text for text in [*texts, outcome.err.encode()]):
        verdict, rated = compare.WRONG, {"the key": ["shown"]}
    for own in (right, folder_):
        shutil.rmtree(own)
        for suffix in (".out", ".err", ".events"):
            Path(f"{own}{suffix}").unlink(missing_ok=True)
    return {"outcome": verdict, **_shown(outcome, rated)}


def totals(faults: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers of faults and of outcomes, by fault and by stage."""
    tried = [one for one in faults if one["outcome"] != "does not apply"]

    def by(name: str) -> dict[str, dict[str, int]]:
        keys = dict.fromkeys(_column(one, name) for one in tried)
        return {key: dict(Counter(one["outcome"] for one in tried if _column(one, name) == key)) for key in keys}

    counted = Counter(one["outcome"] for one in tried)
    bad = {name: counted[name] for name in compare.BAD}
    return {"faults": len(tried), **bad, "outcomes": dict(counted), "by_fault": by("fault"), "by_stage": by("stage")}


def _column(one: Mapping[str, Any], name: str) -> str:
    return one[name].partition("@")[0]


@script("trust")
def main(config: dict[str, Any]) -> None:
    run = campaign.prepare(config, "faults")
    done = run.each(plan(run.world, run.kinds, config), partial(one_fault, run.world))
    record = run.header() | {"totals": totals(done), "faults": done}
    records.write_json(run.record, record)
    run.show()
    log.info("%s: %s", run.record, json.dumps({k: record["totals"][k] for k in ("faults", *compare.BAD)}))


if __name__ == "__main__":
    main()
