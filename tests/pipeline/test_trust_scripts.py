"""The two campaigns on stages of a few lines: good ones pass, and what is planted in bad ones is found."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

from finetune.trust.compare import HANG, HARMLESS, REDONE, REFUSED, TRACEBACK, WRONG
from finetune.trust.damage import KINDS
from finetune.trust.world import Stage, World

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
HEAD = """
import json, os, sys, time
from pathlib import Path
from finetune.store.records import read_json, write_json
out, source = Path("results/a.json"), Path("results/in.json")
"""
GOOD = """
try:
    write_json(out, {"score": read_json(source)["score"]})
except (ValueError, KeyError) as error:
    sys.exit(f"error: {error}")
"""
PLANTED = {
    "good": (GOOD, "same"),
    "not whole": ("""
if not out.exists():
    out.write_text('{"score": ')
    with out.open("a") as file:
        file.write("0.5}")
""", "different"),
    "left": ("""
if Path("results/begun").exists():
    write_json("results/old.json", {})
write_json("results/begun", {})
write_json(out, {"score": 0.5})
Path("results/begun").unlink()
""", "files left"),
    "locked": ("""
lock = Path("results/lock")
while lock.exists():
    time.sleep(0.05)
lock.touch()
write_json(out, {"score": 0.5})
lock.unlink()
""", HANG),
    "fails": ("""
folder = Path("results/made")
folder.mkdir()
write_json(out, {"score": 0.5})
folder.rmdir()
""", TRACEBACK),
}  # fmt: skip


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def world(tmp_path):
    """``world(lines)``: a folder in which a stage of these lines has run once."""
    from finetune.trust import driver

    def make(lines):
        folder = tmp_path / "world"
        (folder / "experiments").mkdir(parents=True)
        (folder / "experiments" / "x.py").write_text(HEAD + lines)
        (folder / "results").mkdir()
        (folder / "results" / "in.json").write_text(json.dumps({"schema": 1, "score": 0.5}))
        done = driver.run(folder, ["experiments/x.py"], limit=30)
        assert done.code == 0, done.err
        files = ("results/in.json",), ("results/a.json",)
        return World(folder, (Stage("x@a", ("experiments/x.py",), *files, done.events, 0.1),))

    return make


@pytest.mark.parametrize(("lines", "expected"), PLANTED.values(), ids=PLANTED)
def test_what_a_kill_breaks_is_found(lines, expected, world, tmp_path):
    kills, made = load("trust_kills"), world(lines)
    calls = range(len(made.stages[0].events))[-1 if expected == HANG else 0 :]
    found = [
        kills.one_kill(
            made, tmp_path / "copy", 2, {"stage": "x@a", "driver": "calls", "trouble": {"kind": "kill", "at": at}}
        )
        for at in calls
    ]
    outcomes = {one["outcome"] for one in found}
    assert expected in outcomes and outcomes <= {"same", expected}, found
    totals = kills.totals([one | {"kind": "x", "driver": "calls"} for one in found])
    assert totals["kills"] == len(calls) and totals["hangs"] == sum(one["outcome"] == HANG for one in found)


@pytest.mark.parametrize("driver_name", ["pairs", "both"])
def test_two_callers_are_told_apart(driver_name, world, tmp_path):
    kills, made = load("trust_kills"), world(GOOD)
    trouble = {"kind": "pause", "at": 0}
    found = kills.one_kill(made, tmp_path / "copy", 10, {"stage": "x@a", "driver": driver_name, "trouble": trouble})
    assert (found["outcome"], found["second"], found.get("first")) == (
        "same", "done", "done" if driver_name == "both" else None
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "fault", "file", "expected"),
    [
        (GOOD, "truncated", "results/in.json", REFUSED),
        (GOOD, "older", "results/in.json", HARMLESS),
        (GOOD, "edited", "results/in.json", WRONG),
        (GOOD, "edited", "results/a.json", REDONE),
        (GOOD, "missing", "results/in.json", REFUSED),
        (GOOD.replace("except (ValueError", "except (LookupError"), "truncated", "results/in.json", TRACEBACK),
        ("if not out.exists():\n    write_json(out, {'score': 0.5})", "edited", "results/a.json", WRONG),
        ("while out.is_dir():\n    time.sleep(0.1)\nwrite_json(out, {'score': 0.5})", "folder", "results/a.json", HANG),
    ],
)
def test_what_a_fault_breaks_is_found(lines, fault, file, expected, world, tmp_path):
    faults, made = load("trust_faults"), world(lines)
    role = "input" if file.endswith("in.json") else "output"
    own = {"stage": "x@a", "fault": fault, "file": file, "role": role, "other": None, "seed": 0}
    found = faults.one_fault(made, tmp_path / "copy", 2, own)
    assert found["outcome"] == expected, found
    totals = faults.totals([own | found])
    assert totals["faults"] == 1 and totals["by_fault"] == {fault: {expected: 1}}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (GOOD.replace("except (", "except (OSError, "), REFUSED),
        (GOOD, TRACEBACK),
        (
            "begun = Path('results/begun')\nscore = 0.75 if begun.exists() else 0.5\nbegun.touch()\n"
            "try:\n    write_json(out, {'score': score})\nexcept OSError as error:\n    sys.exit(f'error: {error}')\n"
            "begun.unlink()",
            WRONG,
        ),
    ],
    ids=["refused, then right", "traceback", "refused, then wrong"],
)
def test_a_full_disk_is_refused_and_leaves_no_trace(lines, expected, world, tmp_path):
    faults, made = load("trust_faults"), world(lines)
    at = next(n for n, event in enumerate(made.stages[0].events) if event.startswith("os.fsync"))
    own = {"stage": "x@a", "fault": "full", "trouble": {"kind": "full", "at": at}}
    assert faults.one_fault(made, tmp_path / "copy", 20, own)["outcome"] == expected


def test_plans_are_drawn_from_the_seed_and_leave_nothing_out(world):
    made = world(GOOD)
    kinds = {"x": made.stages}
    counts = {"calls": 4, "bytes": 1, "delays": 0, "pairs": 1, "both": 1, "whole": 1}
    kills = load("trust_kills")
    first, second = (kills.plan(kinds, counts, 3.0, seed) for seed in (0, 0))
    assert first == second != kills.plan(kinds, counts, 3.0, 1)
    drivers = [kill["driver"] for kill in first]
    assert {name: drivers.count(name) for name in counts} == counts
    calls = [kill["trouble"]["at"] for kill in first if kill["driver"] == "calls"]
    assert calls == sorted(calls) and max(calls) < len(made.stages[0].events)
    found = load("trust_faults").of_files(made, made.stages[0], random.Random(0))
    assert {one["fault"] for one in found} == {*KINDS} and {one["role"] for one in found} == {"input", "output"}
