"""The script for a card: what fits is measured, once, most telling first. No part here needs a card."""

import json
from pathlib import Path

import pytest
import torch

from finetune.efficiency import card as script
from finetune.efficiency import variant_memory
from finetune.efficiency.card import Card, ask, main
from finetune.efficiency.card_parts import SMOKE, Part, Sizes, plan
from finetune.methods.costs import RESIDENT
from finetune.store.records import PROJECT, read_json

CPU = torch.device("cpu")


class Clock:
    """Seconds that parts take by themselves."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


@pytest.fixture
def card(tmp_path):
    """``card(minutes=1, commit="a")``: of a clock that stands still unless a part moves it."""

    def make(minutes=1, commit="a"):
        known = read_json(tmp_path / "card.json")["parts"] if (tmp_path / "card.json").exists() else {}
        return Card(tmp_path, CPU, commit, 60 * minutes, Clock(), known)

    return make


@pytest.fixture
def part():
    """``part("name", estimated, takes)``, which writes when it ran; ``error`` is raised instead."""

    def make(name, estimated=10, takes=10, group="", error=None):
        def run(stage):
            made.clock().time += takes
            if error:
                raise error
            stage.path.write_text(json.dumps({"commit": stage.commit}))

        made = Part(name, f"{name}.json", estimated, group or name, {"asked": name}, run)
        object.__setattr__(made, "clock", lambda: current[0])
        return made

    current = [None]
    make.on = lambda card: current.__setitem__(0, card.now) or card
    return make


def test_parts_run_in_order_and_those_that_do_not_fit_are_not_begun(card, part, tmp_path):
    parts = [part("a", 20, 20), part("b", 50), part("c", 30, 30)]
    left = ask(part.on(card()), parts)
    assert left == {"b": "needs about 50 s, 40 s are left"}
    assert sorted(path.name for path in tmp_path.glob("?.json")) == ["a.json", "c.json"]


def test_an_estimate_is_corrected_by_what_was_seen(card, part):
    parts = [part("a", 10, 40, "same"), part("b", 10, 40, "same"), part("c", 10, 10, "other")]
    assert ask(part.on(card()), parts) == {"b": "needs about 40 s, 20 s are left"}


def test_a_second_call_goes_on_where_the_first_one_ended(card, part, tmp_path):
    parts = [part("a", 40), part("b", 40, 40)]
    assert list(ask(part.on(card(0.7)), parts)) == ["b"]
    (tmp_path / "a.json").write_text("kept")
    assert not ask(part.on(card(0.7)), parts) and (tmp_path / "a.json").read_text() == "kept"
    assert not ask(part.on(card(2, commit="b")), parts)
    assert read_json(tmp_path / "a.json") == {"commit": "b"}


def test_a_part_that_fails_is_said_and_comes_last_the_next_time(card, part, tmp_path):
    parts = [part("a", 10, 10, error=ValueError("no")), part("b")]
    assert ask(part.on(card()), parts) == {"a": "ValueError: no"}
    again = part.on(card())
    assert [one.name for one in sorted(parts, key=again.has_failed)] == ["b", "a"]
    assert read_json(tmp_path / "card.json")["parts"]["a"]["failed"] == "ValueError: no"


def test_the_plan_lies_as_the_tables_read_it(tmp_path):
    (tmp_path / "stsb.safetensors").touch()
    parts = plan(PROJECT, "cuda", Sizes(), tmp_path)
    paths = [part.path for part in parts]
    assert len(set(paths)) == len(parts) == len({part.name for part in parts})
    folders = {"", "-printed-graphs", "-sound", "-sound-graphs", "-sound-folded", "-printed-folded"}
    wanted = {f"roberta_base{own}" for own in folders} | {"llama2_7b", "llama2_7b-checkpointing"}
    assert {Path(path).parent.name for path in paths if path.startswith("efficiency/")} == wanted
    assert {path for path in paths if "/" not in path} == {
        "cuda_tests.json",
        "profile.json",
        "hosvd_cost.json",
        "cost_curves.json",
        "rotation.json",
    }
    assert paths[0] == "cuda_tests.json" and paths[1:3] == [f"efficiency/roberta_base-{n}/cola.json" for n in _FIRST]


_FIRST = ("sound", "sound-graphs")


def test_a_try_on_a_cpu_writes_a_record_and_finds_it_again(tmp_path, monkeypatch):
    parts = dict.fromkeys((*RESIDENT, "gradients", "saved_activations"), 8)
    found = {"components": parts, "peak_training": 100, "peak_evaluation": 90}
    monkeypatch.setattr(variant_memory, "measure_memory", lambda make, *_, **__: (found, make()))
    monkeypatch.chdir(tmp_path)
    lines, arguments = [], ["--smoke", "--minutes", "99", "--output", "out", "--only", "decoder/"]
    monkeypatch.setattr(script.log, "info", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(script.machine, "check_alone", lambda *_: [])
    main(arguments)
    path = tmp_path / "out" / "efficiency" / SMOKE.decoder / "rows2.json"
    record = read_json(path)
    assert [entry["status"] for entry in record["variants"]] == ["finished"] * 3 + ["skipped"]
    assert record["run"]["scale"] == "card" and "1 of 1 records are there" in lines
    before = path.stat().st_mtime_ns
    main(arguments)
    assert path.stat().st_mtime_ns == before and "decoder/rows2 is finished" in lines


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "torch sees no CUDA device"),
        (["--smoke", "--only", "decoders"], "--only decoders; allowed are beginnings of: cuda_tests, sound/cola"),
        (["--smoke", "--rotation", "/nowhere"], "--rotation /nowhere holds no examples"),
        (["--smoke", "--commit", "abc"], "--commit abc, but the code lies in a repository at"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, text, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script.records, "provenance", lambda commit: {"commit": "def"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=text):
        main(["--minutes", "1", "--output", "out", *arguments])
