"""The campaign's own judgement: what is silently wrong, hangs or is left over is found; kills come where they say."""

import json
import os
import pickle
import random
import signal
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from finetune.store.records import write_json
from finetune.trust import damage, driver
from finetune.trust.campaign import Campaign
from finetune.trust.compare import (
    HANG,
    HARMLESS,
    REDONE,
    REFUSED,
    SAID,
    TRACEBACK,
    WRONG,
    differences,
    judge,
    judge_rerun,
    left_over,
    moving,
    of_numbers,
)
from finetune.trust.driver import Outcome, Trouble
from finetune.trust.endpoint import KEY, FaultyJudge
from finetune.trust.world import Stage, World, _in_order

WELL = Outcome(0)
RECORD = {"score": 0.5, "run": {"config_hash": "a" * 12}, "training": {"seconds": 1.0, "steps": 4}}


@pytest.fixture
def folders(tmp_path):
    """``folders(record, name=...)``: an unbroken run's folder, and one with another record."""

    def make(record, name="runs/cola-seed1.json", right=RECORD):
        pair = tmp_path / "right", tmp_path / "found"
        for folder, content, path in zip(pair, (right, record), ("runs/cola-seed1.json", name), strict=True):
            write_json(folder / path, content)
        return pair

    return make


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (RECORD, HARMLESS),
        (RECORD | {"training": {"seconds": 9.0, "steps": 4}}, HARMLESS),
        (RECORD | {"score": 0.75}, WRONG),
        (RECORD | {"training": {"seconds": 1.0, "steps": 5}}, WRONG),
        ({"run": RECORD["run"]}, WRONG),
        (RECORD | {"score": "0.5"}, WRONG),
        (RECORD | {"score": 0.75, "sha256": "of the new content"}, WRONG),
        (RECORD | {"score": 0.75, "run": {"config_hash": "b" * 12}}, SAID),
    ],
    ids=["same", "time", "score", "steps", "gone", "text", "sealed", "another run"],
)
def test_a_planted_silent_error_is_found(record, expected, folders):
    right, found = folders(record)
    assert judge(WELL, differences(right, found, ["runs"]), mended=False, found=found) == expected


@pytest.mark.parametrize(("name", "expected"), [("runs/mrpc-seed1.json", WRONG), ("runs/elsewhere.json", WRONG)])
def test_a_record_that_is_missing_or_too_much_is_found(name, expected, folders):
    right, found = folders(RECORD, name)
    differing = differences(right, found, ["runs"])
    assert differing == {"runs/cola-seed1.json": ["missing"], name: ["new"]}
    assert judge(WELL, differing, mended=False, found=found) == expected


def test_a_record_under_another_hash_says_that_it_is_of_another_run(tmp_path):
    for folder, digest, score in (("right", "a" * 12, 0.5), ("found", "b" * 12, 0.75)):
        write_json(tmp_path / folder / f"runs/cola-seed1-{digest}.json", {"score": score})
    found = tmp_path / "found"
    assert judge(WELL, differences(tmp_path / "right", found, ["runs"]), mended=False, found=found) == SAID


@pytest.mark.parametrize(
    ("outcome", "mended", "expected"),
    [
        (WELL, True, REDONE),
        (Outcome(1, "error: a.json is damaged: delete it."), False, REFUSED),
        (Outcome(1, "Traceback (most recent call last):\n  File\nKeyError: 'a'"), False, TRACEBACK),
        (Outcome(1, ""), False, TRACEBACK),
        (Outcome(-signal.SIGSEGV, "error: x"), False, TRACEBACK),
        (Outcome(0, hung=True), False, HANG),
    ],
)
def test_how_a_process_ends_is_told_apart(outcome, mended, expected, tmp_path):
    assert judge(outcome, {}, mended=mended, found=tmp_path) == expected


def test_a_run_after_a_kill_is_the_same_or_what_it_is_not(folders):
    right, found = folders(RECORD | {"score": 0.75})
    differing = differences(right, found, ["runs"])
    assert judge_rerun(WELL, differing, []) == "different"
    assert judge_rerun(WELL, {}, ["runs/.a.json.x"]) == "files left" and judge_rerun(WELL, {}, []) == "same"
    assert judge_rerun(Outcome(1, "error: no"), {}, []) == "refused"
    assert judge_rerun(Outcome(1, "Traceback (most recent call last):"), {}, []) == TRACEBACK
    assert judge_rerun(Outcome(-9, hung=True), {}, []) == HANG


def test_left_over_files_are_found_and_what_two_unbroken_runs_differ_in_is_not_compared(folders):
    right, found = folders(RECORD | {"loss": 2.0}, right=RECORD | {"loss": 1.0})
    (found / "runs" / ".cola-seed1.json.abc").touch()
    (found / "outputs" / "hydra").mkdir(parents=True)
    (found / "outputs" / "hydra" / "x").touch()
    assert left_over(right, found) == ["runs/.cola-seed1.json.abc"]
    varying = moving(right, found, ["runs"])
    assert varying == ["runs/cola-seed1.json#/loss"] and not differences(right, found, ["runs"], varying)


def test_a_word_is_no_number(folders):
    right, found = folders(RECORD | {"score": 0.75, "title": "b"}, right=RECORD | {"title": "a"})
    differing = differences(right, found, ["runs"])
    name = "runs/cola-seed1.json"
    assert differing == {name: ["/score", "/title"]}
    assert of_numbers(right, found, differing, name) == {name: ["/score"]}
    assert of_numbers(right, found, {name: ["/title"]}, name) == {}
    assert of_numbers(right, found, {name: ["/title"]}, "other.json") == {name: ["/title"]}


def test_tensors_and_lines_are_compared_one_by_one(tmp_path):
    import torch
    from safetensors.torch import save_file

    for name, value in (("right", 1.0), ("found", 2.0)):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {"same": torch.zeros(2), "other": torch.full((2,), value)}
        save_file(tensors, folder / "a.safetensors", {"sparsegrad": json.dumps({"task": "cola", "seconds": value})})
        (folder / "b.jsonl").write_text(f'{{"id": 1}}\n{{"id": 2, "score": {value}}}\n')
        (folder / "c.md").write_text(f"| {value} |")
        (folder / "d.html").write_text(f"<p>{name} 1.5</p>")
        (folder / "e.png").write_text(name)
    found = differences(tmp_path / "right", tmp_path / "found", ["."])
    assert found == {"a.safetensors": ["/tensors/other"], "b.jsonl": ["/1/score"], "c.md": ["/numbers"], "e.png": [""]}


# The driver


@pytest.fixture
def script(tmp_path):
    """``script(text)``: a folder with a script of these lines."""

    def make(text):
        folder = tmp_path / "copy"
        (folder / "experiments").mkdir(parents=True)
        (folder / "experiments" / "x.py").write_text(text)
        return folder

    return make


WRITES = """
from finetune.store.files import write_atomically
write_atomically("a.txt", "a" * 100)
write_atomically("b.txt", "b" * 100)
"""


def run(folder, trouble=None, limit=30, **env):
    return driver.run(folder, ["experiments/x.py"], trouble, limit=limit, env=env)


def names(folder):
    return sorted(path.name for path in folder.glob("*.txt"))


def test_a_kill_comes_before_each_call_that_changes_a_file(script):
    folder = script(WRITES)
    whole = run(folder)
    assert whole.code == 0 and names(folder) == ["a.txt", "b.txt"]
    calls = [event.split()[0] for event in whole.events]
    assert calls.count("os.rename") == calls.count("os.fsync") == 2
    last = len(whole.events) - 1 - calls[::-1].index("os.rename")
    for at, expected in ((0, []), (calls.index("os.rename"), []), (last, ["a.txt"])):
        for path in folder.glob("*.txt"):
            path.unlink()
        killed = run(folder, Trouble("kill", at))
        assert killed.code == -signal.SIGKILL and names(folder) == expected and len(killed.events) == at + 1
    assert list(folder.glob(".b.txt.*"))


def test_a_planted_hang_is_found_and_ended(script):
    hung = run(script("import time\ntime.sleep(60)\n"), limit=0.3)
    assert hung.hung and hung.seconds < 30 and judge(hung, {}, mended=False, found=Path()) == HANG


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (Trouble("full", 1), "No space left on device"),
        (Trouble("large", 50), "File too large"),
        (Trouble("readonly"), "Read-only file system"),
        (Trouble("locale"), "UnicodeEncodeError"),
    ],
)
def test_a_disk_takes_no_more_and_a_locale_not_all(trouble, said, script):
    folder = script("open('a', 'w').write('ü')" + WRITES)
    done = run(folder, trouble)
    assert done.code == 1 and said in done.err and names(folder) == []


def test_a_file_is_cut_where_the_kill_comes_and_locks_can_be_missing(script):
    folder = script("import fcntl\nopen('a.txt', 'w').write('a' * 100)\nfcntl.flock(0, fcntl.LOCK_SH)\n")
    assert run(folder, Trouble("bytes", 10)).code == -signal.SIGXFSZ
    assert (folder / "a.txt").read_text() == "a" * 10
    done = run(folder, Trouble("flock"))
    assert done.code == 1 and "No locks available" in done.err


def test_its_environment_is_its_own(script, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    folder = script("import os\nprint(os.environ.get('RANK'), 'HOME' in os.environ)\nraise SystemExit('error: no')\n")
    done = run(folder)
    assert done.code == 1 and done.err == f"None {'HOME' in os.environ}\nerror: no\n"
    assert run(folder, RANK="1", HOME=None).err == "1 False\nerror: no\n"


# Damage


@pytest.mark.parametrize("kind", damage.KINDS)
def test_each_damage_changes_the_file(kind, tmp_path):
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    path.write_text(json.dumps({"schema": 1, "run": {"seed": 1}, "score": 0.5}))
    other.write_text("{}")
    before = path.read_bytes()
    assert damage.damage(path, kind, random.Random(0), other=other, root=tmp_path)
    assert not path.is_file() or path.read_bytes() != before
    if kind == "edited":
        assert json.loads(path.read_text()) == {"schema": 1, "run": {"seed": 1}, "score": 0.875}
    if kind == "version":
        assert json.loads(path.read_text())["schema"] == 99
    if kind == "pickle":
        pickle.loads(path.read_bytes())
        assert (tmp_path / damage.MARKER).exists()


def test_what_does_not_fit_a_file_says_so(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("text")
    assert damage.damage(path, "version", random.Random(0), other=None, root=tmp_path) is None
    assert damage.damage(path, "swapped", random.Random(0), other=None, root=tmp_path) is None
    assert path.read_text() == "text"


# The judge and the world


@pytest.mark.parametrize(("when", "statuses"), [("first", [401, 200, 401]), ("always", [401, 401, 401])])
def test_the_judge_is_bad_always_or_once_for_each_answer(when, statuses):
    found = []
    with FaultyJudge("401 with the key", when) as server:
        for text in ("one", "one", "two"):
            body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
            request = urllib.request.Request(f"{server.base_url}/chat/completions", body)
            try:
                with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
                    found.append(answer.status)
            except urllib.error.HTTPError as error:
                found.append(error.code)
                assert KEY.encode() in error.read()
                error.close()
    assert found == statuses


def test_stages_stand_behind_what_they_read_and_a_copy_is_before_or_after(tmp_path):
    stages = [Stage("b", (), ("results/a/x",), ("results/b",)), Stage("a", (), (), ("results/a",))]
    assert [stage.name for stage in _in_order(stages)] == ["a", "b"]
    with pytest.raises(ValueError, match="wait for each other"):
        _in_order([Stage("a", (), ("b",), ("a",)), Stage("b", (), ("a",), ("b",))])
    world = World(tmp_path / "world", tuple(stages))
    for name in ("a", "b"):
        write_json(world.folder / "results" / name / "x.json", {})
    before = world.copy(tmp_path / "copy", stages[0], done=False)
    assert [path.name for path in (before / "results").iterdir()] == ["a"]
    assert left_over(before, world.copy(tmp_path / "after", stages[0], done=True)) == ["results/b/x.json"]


def test_the_table_of_a_page_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- trust -->\n| stage | tried |\n|---|---|\n| old | 1 |\n\nmore\n")
    kills = {"basis": {"same": 3}, "train": {"same": 1}, "train decoder": {"same": 2, "different": 1}}
    write_json(tmp_path / "kills.json", {"totals": {"stages": kills}})
    write_json(tmp_path / "faults.json", {"totals": {"by_stage": {"train": {REFUSED: 4, WRONG: 1}}}})
    one = Campaign({"page": str(page), "output": str(tmp_path)}, "kills", World(tmp_path, ()), {}, tmp_path)
    for _ in range(2):
        one.show()
        head, _, *rows = page.read_text().partition("<!-- trust -->\n")[2].partition("\n\nmore\n")[0].splitlines()
        names = ["stage", "kills, pairs", "then the same", "faults", REFUSED, REDONE, HARMLESS, SAID]
        assert head == f"| {' | '.join([*names, WRONG, TRACEBACK, HANG])} | different after a kill |"
        assert rows == [
            "| basis | 3 | 3 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |",
            "| train | 4 | 3 | 5 | 4 | 0 | 0 | 0 | 1 | 0 | 0 | 1 |",
            "| all | 7 | 6 | 5 | 4 | 0 | 0 | 0 | 1 | 0 | 0 | 1 |",
        ]
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no line <!-- trust -->"):
        one.show()
