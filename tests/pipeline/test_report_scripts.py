"""Table 6, statistics, the page of Appendix E and the report as their stages make them, from an experiment's files."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from finetune.mt_bench.questions import answer_sha256
from finetune.store.files import sha256

ROOT = Path(__file__).parents[2]
RUN = {"experiment": "test", "model": "tiny", "method": "lora", "seed": 1, "protocol": "sound", "scale": "smoke"}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = content if isinstance(content, list) else [content]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def results(tmp_path):
    """One trained, answered and judged model, and two questions, as an experiment's stages leave them."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    places = {"name": "test", "protocol": "sound", "stands_for": {"llama2_7b": "tiny"}, "methods": ["full", "lora"]}
    (work / "params.yaml").write_text(yaml.safe_dump(places))
    root = work / "results" / "test"
    questions = [{"question_id": q, "category": "writing", "turns": [f"Question {q}?", "And then?"]} for q in (84, 95)]
    write(root / "chat" / "mt_bench" / "question.jsonl", questions)
    record = {
        "schema": 1,
        "version": 1,
        "status": "finished",
        "run": RUN | {"kind": "llama", "task": "oasst1", "config_hash": "a"},
        "metric": "loss",
        "score": 1.5,
        "parameters": {"total": 1000, "trainable": 5},
        "model": {"title": "Tiny LLaMA", "random_weights": False},
    }
    runs = root / "runs" / "tiny" / "lora"
    write(runs / "oasst1-seed1-a.json", record)
    write(runs / "cell.json", {"records": ["oasst1-seed1-a.json"]})
    name = "tiny-lora-seed1"
    answers = root / "mt_bench" / "answers" / "tiny" / "lora"
    lines = [
        {"question_id": q, "choices": [{"index": 0, "turns": [f"Answer {q}", "more"]}], "config_hash": "b"}
        for q in (84, 95)
    ]
    write(answers / f"{name}.jsonl", lines)
    record = {"run": RUN | {"kind": "answers", "config_hash": "b"}, "template": "llama-2"}
    write(answers / f"{name}.json", record | {"answers": {"sha256": sha256(answers / f"{name}.jsonl")}})
    judge = {"model": "local", "measures_quality": False, "temperature": 0, "max_tokens": 64, "repeats": 1}
    record = {
        "run": RUN | {"kind": "judgments", "config_hash": "c"},
        "judge": judge,
        "questions": {"file": "question.jsonl", "sha256": "0" * 64, "count": 2},
        "answers": {"cut": 0, "refused": 0},
    }
    judgments = root / "mt_bench" / "judgments" / "tiny" / "lora"
    write(judgments / f"{name}.json", record)
    facts = {"model": name, "judge": ["local", "single-v1"], "repeat": 0, "judgment": "[[6]]", "config_hash": "c"}
    lines = [
        facts | {"question_id": q, "turn": t, "score": 6, "answer_sha256": answer_sha256([f"Answer {q}", "more"][:t])}
        for q in (84, 95)
        for t in (1, 2)
    ]
    write(judgments / f"{name}.jsonl", lines)
    return root


def test_table_6(script, results):
    done = script("table", "number=6", "name=test", "questions=generated")
    assert done.code == 0 and done.out == "", done.err
    with (results / "tables" / "table_06.csv").open(newline="") as file:
        cells = {(row["row"], row["column"]): row for row in csv.DictReader(file)}
    assert [cells["LoRA", column]["ours"] for column in ("#Train params", "Valid Loss", "I-Bench Score")] == [
        "0.5",
        "1.5",
        "6",
    ]
    # Run outside the repository, where conf/model is not: no shares, and no error.
    assert len(cells) == 12
    assert "writing 6.000" in (results / "tables" / "table_06.md").read_text()
    assert (results / "tables" / "table_06.tex").is_file()


def test_table_6_with_nothing_done_says_why(script, results):
    for part in ("runs", "mt_bench"):
        (results / part).rename(results.parent / part)
    (results.parents[1] / "conf" / "model").mkdir(parents=True)
    source = ROOT / "conf" / "model" / "llama2_7b.yaml"
    (results.parents[1] / "conf" / "model" / "llama2_7b.yaml").write_text(source.read_text())
    done = script("table", "number=6", "name=test")
    assert done.code == 0, done.err
    with (results / "tables" / "table_06.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if not row["column"].endswith("share")]
    assert [row["verdict"] for row in ours] == ["not run"] * 12 and len(rows) == 24
    assert all("no finished run of tiny" in row["source"] or "no judgments" in row["source"] for row in ours)
    shares = [f"{float(row['ours']):.2f}" for row in rows if row not in ours and row["row"] == "Regular FT"]
    assert shares == ["14.72", "22.08", "42.82"]


def test_examples(script, results):
    done = script("examples", "name=test", "questions=generated")
    assert done.code == 0 and done.out == "", done.err
    page = (results / "examples.html").read_text()
    assert all(
        text in page
        for text in ("Question 84?", "Answer 84", "Answer 95", "tiny stands in", "not a measure of quality")
    )


@pytest.mark.parametrize(
    ("name", "overrides", "text"),
    [
        ("table", ["number=6", "questions=nope"], "Could not find 'questions/nope'"),
        ("table", ["number=6", "name=other"], "params.yaml is experiment 'test', not 'other'"),
        ("examples", ["questions=generated", "questions.examples=[1]"], "name at least one question"),
        ("examples", ["questions=generated", "questions.root=/no/such/folder"], "/no/such/folder/mt_bench"),
    ],
)
def test_wrong_input(name, overrides, text, script, results):
    done = script(name, "name=test", *overrides)
    assert done.code != 0 and text in done.err and "Traceback" not in done.err, done.err
    assert not (results / "tables").exists() and not (results / "examples.html").exists()


def test_statistics_and_the_figure_of_scores(script, tmp_path):
    root = tmp_path / "work" / "results" / "test"
    experiment = {"name": "test", "protocol": "sound", "stands_for": {"bert_base": "tiny"}}
    experiment |= {"data": "glue", "methods": ["full", "sparsegrad"], "tasks": ["cola"]}
    (tmp_path / "work" / "params.yaml").write_text(yaml.safe_dump(experiment))
    (tmp_path / "work" / "conf").symlink_to(ROOT / "conf")
    for method, shift in (("full", 0.0), ("sparsegrad", 0.05)):
        folder = root / "runs" / "tiny" / method
        record = {"schema": 1, "version": 1, "status": "finished", "metric": "accuracy"}
        record |= {"parameters": {"trainable": 5, "trainable_per_layer": 1.0}}
        record |= {"model": {"title": "T", "random_weights": False}}
        for seed in (1, 2, 3):
            run = RUN | {"kind": "train", "method": method, "task": "cola", "seed": seed}
            write(folder / f"cola-seed{seed}.json", record | {"run": run, "score": 0.5 + shift * seed})
        write(folder / "cell.json", {"records": [f"cola-seed{seed}.json" for seed in (1, 2, 3)]})
    done = script("method_statistics", "name=test", "samples=500")
    assert done.code == 0 and done.out == "", done.err
    content = json.loads((root / "statistics.json").read_text())
    (pair,) = content["runs"][0]["comparison"]["families"][0]["pairs"]
    assert pair["mean"]["difference"]["value"] == pytest.approx(10.0) and pair["mean"]["p"] == 0.25
    assert "## Our runs: T (tiny)" in (root / "statistics.md").read_text()
    done = script("figure", "figure=methods_scores", "name=test")
    assert done.code == 0 and done.out == "", done.err
    assert {path.suffix for path in (root / "figures").glob("methods_scores.*")} == {".json", ".png", ".svg"}
    done = script("method_statistics", "name=other")
    assert done.code != 0 and "params.yaml is experiment 'test', not 'other'" in done.err


# The page


@pytest.fixture
def work(tmp_path):
    """A folder with the project's configuration, an experiment, and one record."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    (work / "conf").symlink_to(ROOT / "conf")
    experiment = {"name": "test", "protocol": "sound", "scale": "smoke", "tasks": ["cola"], "tables": []}
    (work / "params.yaml").write_text(yaml.safe_dump(experiment | {"stands_for": {"bert_base": "tiny"}}))
    record = {"run": {"kind": "judgments", "model": "tiny"}, "judge": {"measures_quality": True}}
    record |= {"provenance": {"commit": "abc", "packages": {}}}
    write(work / "results" / "test" / "mt_bench" / "a.json", record)
    return work


def test_the_script_writes_one_page(script, work):
    done = script("report", "name=test")
    assert done.code == 0 and done.out == "", done.err
    path = work / "results" / "test" / "report.html"
    first = path.read_bytes()
    assert b"<h1>SparseGrad, reproduced</h1>" in first and b"figure_02 (weight gradients" in first
    assert script("report", "name=test").code == 0 and path.read_bytes() == first


def test_wrong_input_of_the_page_is_one_line(script, work):
    done = script("report", "name=other")
    assert done.code != 0 and "is experiment 'test', not 'other'" in done.err and "Traceback" not in done.err
    (work / "results" / "test" / "mt_bench" / "a.json").write_text("{")
    done = script("report", "name=test")
    assert done.code != 0 and "a.json is damaged" in done.err and "Traceback" not in done.err
    assert not (work / "results" / "test" / "report.html").exists()
