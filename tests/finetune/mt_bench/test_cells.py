"""A cell of judgments: records, the local judge started for it, failures above what is allowed, what is reused."""

import hashlib
import json
import shutil
from pathlib import Path

import judge_endpoint as bench
import pytest

from finetune.mt_bench import judgment_cells
from finetune.mt_bench.client import JudgeUnusable
from finetune.mt_bench.judged import read_judgments
from finetune.mt_bench.judgment_cells import judge_cells
from finetune.store import records

ROOT = Path(__file__).parents[3]
KEY = "sk-test-0123456789abcdefghij"
NAMES = ["tiny-lora-seed1", "tiny-lora-seed2"]


@pytest.fixture
def judge(compose, tmp_path):
    """``judge("local", seeds=[1, 2], methods=["lora"], base_url=...)``: the small bench; returns the folder of lora."""
    bench.write_lines(tmp_path / "bench/question.jsonl", bench.questions())
    bench.write_lines(tmp_path / "bench/judge_prompts.jsonl", bench.prompts().values())
    for name in NAMES:
        lines = [
            found | {"cut": [False, found["question_id"] < 3], "refused": [False, False]}
            for found in bench.answers(model=name).values()
        ]
        bench.write_lines(tmp_path / f"answers/lora/{name}.jsonl", lines)

    def run(group="local", seeds=(1, 2), methods=("lora",), version=1, **changes):
        folder = tmp_path / "judgments"
        judge = compose(f"judge={group}", "model=llama2_7b", "scale=llama/smoke", config_name="mt_bench")["judge"]
        questions = {"name": "small", "root": str(tmp_path), "folder": "bench", "questions": "question.jsonl"}
        config = {
            "name": "test",
            "version": version,
            "model": {"name": "tiny"},
            "checkpoints": str(tmp_path / "locks"),
            "protocol": {"name": "sound"},
            "scale": {"name": "smoke"},
            "questions": questions
            | {"judge_prompts": "judge_prompts.jsonl", "references": None, "reference_source": "questions"},
            "judge": judge | {"max_retries": 0} | changes,
            "progress": False,
        }
        judge_cells(config, methods, seeds, tmp_path / "answers", folder)
        return folder / "lora"

    return run


def test_a_cell_starts_its_judge_and_writes_records_that_the_table_reads(judge, tmp_path):
    folder = judge()
    record = records.read_json(folder / f"{NAMES[0]}.json")
    answers = (tmp_path / f"answers/lora/{NAMES[0]}.jsonl").read_bytes()
    questions = (tmp_path / "bench/question.jsonl").read_bytes()
    digest = record["run"].pop("config_hash")
    expected = {"experiment": "test", "kind": "judgments", "model": "tiny", "method": "lora", "seed": 1}
    assert record["run"] == expected | {"task": "mt_bench", "protocol": "sound", "scale": "smoke"}
    assert (record["status"], record["error"], record["version"]) == ("finished", None, 1)
    assert record["counts"] == {"items": 32, "judged": 32, "failed": 0, "differing": 0}
    asked = {"name": "local", "model": "local-judge", "endpoint": "started by the stage", "measures_quality": False}
    assert record["judge"] == asked | {"temperature": 0, "max_tokens": 2048, "repeats": 2, "parsing": "last"}
    assert record["answers"] == {"cut": 2, "refused": 0, "sha256": hashlib.sha256(answers).hexdigest()}
    assert record["questions"]["count"] == 8
    assert record["questions"]["sha256"] == hashlib.sha256(questions).hexdigest()
    assert set(record["provenance"]) == {"commit", "dirty", "packages", "python", "platform", "created"}
    lines = [json.loads(line) for line in (folder / f"{NAMES[0]}.jsonl").read_text().splitlines()]
    assert {line["config_hash"] for line in lines} == {digest}
    assert all("not a measure of quality" in line["judgment"] for line in lines)
    assert records.read_json(folder / "cell.json") == {"records": [f"{name}.json" for name in NAMES]}
    found = list(read_judgments(folder))
    assert [(len(one.lines), one.missing, one.foreign) for one in found] == [(32, 0, 0)] * 2


def test_a_second_run_changes_no_file(judge):
    folder = judge()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    judge()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_another_version_is_judged_anew(judge, server):
    settings = {"group": "open_weight", "base_url": server.base_url, "seeds": [1]}
    judge(**settings)
    asked = len(server.requests)
    folder = judge(**settings)
    assert len(server.requests) == asked == 32
    judge(**settings, version=2)
    assert len(server.requests) == 64
    assert [(one.missing, one.foreign) for one in read_judgments(folder)] == [(0, 0)]


def test_failures_end_the_cell_after_everything_is_done_and_a_rerun_retries_them(judge, server):
    def faulty(item, times):
        if item[0] == 3:
            return bench.says("no rating at all")
        return bench.fails(500, "boom") if item == (4, 1) else bench.says("[[5]]")

    server.answer = faulty
    settings = {"group": "open_weight", "base_url": server.base_url, "repeats": 1}
    message = "2 of 2 failed; tiny-lora-seed1: 3 of 16 .*, 2 of them with: no rating .*; tiny-lora-seed2: 3 of 16"
    with pytest.raises(ValueError, match=message):
        judge(**settings)
    asked = len(server.requests)
    with pytest.raises(ValueError, match="3 of 16"):
        judge(**settings, allowed_failures=2)
    assert len(server.requests) == asked + 6
    folder = judge(**settings, allowed_failures=3)
    record = records.read_json(folder / f"{NAMES[1]}.json")
    assert (record["status"], record["counts"]) == (
        "finished",
        {"items": 16, "judged": 13, "failed": 3, "differing": 0},
    )
    assert record["judge"]["endpoint"] == server.base_url and record["judge"]["measures_quality"] is True
    with pytest.raises(ValueError, match="3 of 16"):
        judge(**settings)
    record = records.read_json(folder / f"{NAMES[1]}.json")
    assert record["status"] == "failed" and "3 of 16 judgments failed" in record["error"]
    assert [one.missing for one in read_judgments(folder)] == [3, 3]
    server.answer = lambda item, times: bench.says("[[5]]")
    judge(**settings)
    assert [one.missing for one in read_judgments(folder)] == [0, 0]
    assert records.read_json(folder / f"{NAMES[1]}.json")["status"] == "finished"


def test_an_unusable_judge_stops_the_cell_at_once_with_its_state_in_the_record(judge, server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.answer = lambda item, times: bench.fails(401, KEY) if len(server.requests) > 4 else bench.says("[[5]]")
    with pytest.raises(JudgeUnusable, match="environment variable OPENAI_API_KEY"):
        judge("openai", base_url=server.base_url, parallel=1)
    record = records.read_json(tmp_path / f"judgments/lora/{NAMES[0]}.json")
    assert record["status"] == "failed" and "refuses access" in record["error"]
    assert record["counts"] == {"items": 32, "judged": 4, "failed": 0}
    assert not (tmp_path / f"judgments/lora/{NAMES[1]}.json").exists() and len(server.requests) == 5
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY not in path.read_text()


def test_no_answers_of_one_seed_or_method_leave_the_others_judged(judge, tmp_path, monkeypatch):
    started = []
    enter = judgment_cells.LocalJudge.__enter__
    monkeypatch.setattr(judgment_cells.LocalJudge, "__enter__", lambda self: started.append(self) or enter(self))
    (tmp_path / "answers/full").mkdir()
    shutil.copy(tmp_path / f"answers/lora/{NAMES[0]}.jsonl", tmp_path / "answers/full/tiny-full-seed1.jsonl")
    with pytest.raises(ValueError, match="4 of 6 failed; tiny-full-seed3: .* does not exist") as error:
        judge(seeds=(1, 3), methods=("full", "meprop", "lora"))
    assert "tiny-meprop-seed1.jsonl does not exist: run the stage" in str(error.value) and len(started) == 1
    folder = tmp_path / "judgments"
    listed = {path.parent.name: records.read_json(path)["records"] for path in folder.glob("*/cell.json")}
    assert listed == {"full": ["tiny-full-seed1.json"], "meprop": [], "lora": ["tiny-lora-seed1.json"]}
    assert records.read_json(folder / "full/tiny-full-seed1.json")["run"]["method"] == "full"


def test_a_missing_key_is_named_and_changes_nothing(judge, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    folder = judge()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="environment variable OPENAI_API_KEY is not set"):
        judge("openai")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_every_group_of_judges_composes(compose):
    for group in ("open_weight", "openai", "local"):
        held = compose(f"judge={group}", "model=llama2_7b", config_name="mt_bench")
        assert held["judge"]["name"] == group and held["protocol"]["name"] == "sound"
        assert held["judge"]["repeats"] == held["scale"]["judging"]["repeats"]
