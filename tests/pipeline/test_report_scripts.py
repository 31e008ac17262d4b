"""Table 6, the page of Appendix E and the report as their stages make them, where little or nothing ran."""

import csv
import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path):
    """An experiment of which nothing ran, and its questions."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    places = {"name": "test", "protocol": "sound", "stands_for": {"llama2_7b": "tiny"}, "methods": ["full", "lora"]}
    (work / "params.yaml").write_text(yaml.safe_dump(places))
    root = work / "results" / "test"
    write(
        root / "chat" / "mt_bench" / "question.jsonl", {"question_id": 84, "category": "writing", "turns": ["a", "b"]}
    )
    return root


def test_table_6_with_nothing_done_says_why(script, results):
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


# The page


@pytest.fixture
def work(tmp_path):
    """A folder with the project's configuration, an experiment, and one record."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    (work / "conf").symlink_to(ROOT / "conf")
    experiment = {"name": "test", "protocol": "sound", "scale": "smoke", "tasks": ["cola"], "tables": []}
    (work / "params.yaml").write_text(yaml.safe_dump(experiment | {"stands_for": {"bert_base": "tiny"}}))
    write(work / "results" / "test" / "mt_bench" / "a.json", {"provenance": {"commit": "abc", "packages": {}}})
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
