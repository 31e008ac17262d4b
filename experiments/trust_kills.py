"""Kill every stage at every kind of point, run it again, and compare with an unbroken run.

    python experiments/trust_kills.py                                  # writes results/trust/kills.json
    python experiments/trust_kills.py stages=[basis] output=outputs/trust

The stages are those of a tiny experiment; see conf/trust.yaml. A rerun goes on where it was.
"""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from finetune.runs.command import script
from finetune.store import records
from finetune.trust import campaign, driver
from finetune.trust.compare import differences, judge_rerun, left_over
from finetune.trust.driver import Outcome, Trouble
from finetune.trust.world import Stage, World

log = logging.getLogger(__name__)
BYTES = (1, 100, 1000, 10_000)


def plan(kinds: Mapping[str, Sequence[Stage]], counts: Mapping[str, int], slow: float, seed: int) -> list[dict]:
    """The kills, as plain values: stage, driver and trouble."""
    found = []
    for kind, stages in kinds.items():
        draw = random.Random(f"{seed} {kind}")
        few = min(1.0, slow / max(stage.seconds for stage in stages))
        for name, wanted in counts.items():
            number = max(1, round(wanted * few)) if wanted else 0
            for turn in range(number):
                stage = stages[turn % len(stages)] if name == "calls" else draw.choice(stages)
                trouble = _trouble(name, stage, turn / number if name == "calls" else None, number, draw)
                own = {"driver": name, "trouble": asdict(trouble), "turn": turn}
                found.append({"kind": kind, "stage": stage.name, **own})
    return found


def _trouble(name: str, stage: Stage, share: float | None, number: int, draw: random.Random) -> Trouble:
    """Of a driver; its calls are spread over the whole stage, at another place of each part."""
    calls = len(stage.events)
    at = draw.randrange(calls) if share is None else int((share + draw.random() / number) * calls)
    if name == "bytes":
        return Trouble("bytes", draw.choice(BYTES))
    if name in ("delays", "whole"):
        return Trouble("delay", round(draw.uniform(0.05, 0.9) * stage.seconds, 3))
    return Trouble("kill" if name == "calls" else "pause", at)


def one_kill(world: World, folder: Path, limit: float, kill: Mapping[str, Any]) -> dict[str, Any]:
    """Kill, run again, compare; what was seen."""
    stage = next(one for one in world.stages if one.name == kill["stage"])
    world.copy(folder, stage, done=False)
    trouble, how = Trouble(**kill["trouble"]), kill["driver"]
    if how in ("pairs", "both"):
        killed, seen = pair(folder, stage, trouble, limit, killed=how == "pairs")
    elif how == "whole":
        killed, seen = whole(folder, stage, trouble.at, limit), {}
    else:
        killed = driver.run(folder, stage.words, trouble, limit=limit)
        seen = {"point": killed.events[-1]} if killed.events else {}
    if how != "both" and killed.code not in (-signal.SIGKILL, -signal.SIGXFSZ):
        return {"outcome": "not killed", "code": killed.code, "error": killed.err[-200:], **seen}
    again = driver.run(folder, stage.words, limit=limit)
    differing = differences(world.folder, folder, stage.outs, stage.moving)
    left = left_over(world.folder, folder)
    seen |= {"outcome": judge_rerun(again, differing, left), "rerun_seconds": round(again.seconds, 2)}
    if differing:
        seen["differences"] = {name: paths[:5] for name, paths in list(differing.items())[:10]}
    return seen | ({"left": left[:10]} if left else {}) | ({"error": again.err[-600:]} if again.code else {})


def pair(folder: Path, stage: Stage, trouble: Trouble, limit: float, *, killed: bool) -> tuple[Outcome, dict[str, Any]]:
    """One stands still at a call, a second comes and ends, then the first is killed, or goes on."""
    first = driver.start(folder, stage.words, trouble, {})
    if not os.WIFSTOPPED(status := os.waitpid(first.pid, os.WUNTRACED)[1]):
        os.close(first.says)
        return Outcome(os.waitstatus_to_exitcode(status)), {}
    seen = {"point": driver.events_of(folder)[-1]}
    seen["second"] = ended(driver.run(folder, stage.words, limit=limit))
    os.killpg(first.pid, signal.SIGKILL if killed else signal.SIGCONT)
    outcome = driver.finish(first, limit)
    return outcome, seen if killed else seen | {"first": ended(outcome)}


def ended(outcome: Outcome) -> str:
    """How one of two callers ended: ``done``, ``refused``, ``traceback`` or ``hang``."""
    return "done" if outcome.code == 0 else judge_rerun(outcome, {}, [])


def whole(folder: Path, stage: Stage, delay: float, limit: float) -> Outcome:
    """A Python process of its own, killed a while after the first file of the stage has come."""
    before = {path for out in stage.outs for path in (folder / out).rglob("*")}
    environment = os.environ | driver.ENVIRONMENT
    words, log_file = [sys.executable, *stage.words], Path(f"{folder}.err")
    with log_file.open("w") as err:
        process = subprocess.Popen(
            words, cwd=folder, stderr=err, stdout=err, start_new_session=True, env={**environment}
        )
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < limit:
            if {path for out in stage.outs for path in (folder / out).rglob("*")} - before:
                time.sleep(delay)
                break
            time.sleep(0.02)
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        code = process.wait()
        with suppress(ProcessLookupError):  # what a kill of the parent alone leaves: it ends by itself, or here
            os.killpg(process.pid, signal.SIGKILL)
    return Outcome(code, log_file.read_text())


def totals(kills: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers of kills and of what must be none; two callers of which none is killed stand beside."""
    done = [kill for kill in kills if kill["outcome"] != "not killed"]
    outcomes = Counter(kill["outcome"] for kill in done)
    callers = {name: dict(Counter(kill[name] for kill in done if name in kill)) for name in ("first", "second")}
    killed = [kill for kill in done if kill["driver"] != "both"]
    by_kind = {
        kind: dict(Counter(kill["outcome"] for kill in done if kill["kind"] == kind))
        for kind in dict.fromkeys(kill["kind"] for kill in done)
    }
    return {
        "kills": len(killed),
        "not_killed": len(kills) - len(done),
        "drivers": dict(Counter(kill["driver"] for kill in done)),
        "outcomes": dict(outcomes),
        "differences": sum("differences" in kill for kill in done),
        "hangs": outcomes["hang"] + sum(found.get("hang", 0) for found in callers.values()),
        "left_files": sum(len(kill.get("left", ())) for kill in done),
        "two_at_once": callers,
        "stages": by_kind,
    }


@script("trust")
def main(config: dict[str, Any]) -> None:
    run = campaign.prepare(config, "kills")
    kills = plan(run.kinds, config["kills"], config["slow"], config["seed"])
    done = run.each(kills, partial(one_kill, run.world))
    record = run.header() | {"totals": totals(done), "kills": done}
    records.write_json(run.record, record)
    run.show()
    log.info("%s: %s", run.record, {k: v for k, v in record["totals"].items() if k != "stages"})


if __name__ == "__main__":
    main()
