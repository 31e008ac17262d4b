"""The report's stage: the page as its script makes it, and its place at the end of the graph."""

import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def work(tmp_path):
    """A folder with the project's configuration, an experiment, and one table."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    (work / "conf").symlink_to(ROOT / "conf")
    experiment = {"name": "test", "protocol": "sound", "scale": "smoke", "tasks": ["cola"], "tables": {}}
    (work / "params.yaml").write_text(yaml.safe_dump(experiment | {"stands_for": {"bert_base": "tiny"}}))
    record = {"run": {"kind": "judgments", "model": "tiny"}, "provenance": {"commit": "abc", "packages": {}}}
    (work / "results" / "test" / "mt_bench").mkdir(parents=True)
    (work / "results" / "test" / "mt_bench" / "a.json").write_text(json.dumps(record))
    return work


def test_the_script_writes_one_page(script, work):
    done = script("report", "name=test")
    assert done.code == 0 and done.out == "", done.err
    path = work / "results" / "test" / "report.html"
    first = path.read_bytes()
    assert b"<h1>SparseGrad, reproduced</h1>" in first and b"figure_02 (weight gradients" in first
    assert script("report", "name=test").code == 0 and path.read_bytes() == first


def test_wrong_input_is_one_line(script, work):
    done = script("report", "name=other")
    assert (
        done.code != 0 and "params.yaml is experiment 'test', not 'other'" in done.err and "Traceback" not in done.err
    )
    (work / "results" / "test" / "mt_bench" / "a.json").write_text("{")
    done = script("report", "name=test")
    assert done.code != 0 and "a.json is damaged" in done.err and "Traceback" not in done.err
    assert not (work / "results" / "test" / "report.html").exists()


def folders_of(stage, kind):
    """Paths of a stage's outputs or dependencies, without options."""
    return [next(iter(path)) if isinstance(path, dict) else path for path in stage.get(kind, [])]


def test_the_report_comes_last_in_the_graph():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    report = stages.pop("report")
    (page,) = folders_of(report, "outs")
    deps = [f"{path}/" for path in folders_of(report, "deps")]
    before = set()
    for name, stage in stages.items():
        assert not any(page.startswith(path) for path in folders_of(stage, "deps")), name
        if any(f"{out}/".startswith(dep) for out in folders_of(stage, "outs") for dep in deps):
            before.add(name)
    # Every other stage is behind the page, itself or through a stage that needs it.
    while True:
        needed = [f"{path}/" for name in before for path in folders_of(stages[name], "deps")]
        more = {
            name
            for name, stage in stages.items()
            if any(f"{out}/".startswith(path) for out in folders_of(stage, "outs") for path in needed)
            or any(path.startswith(f"{out}/") for out in folders_of(stage, "outs") for path in needed)
        }
        if more <= before:
            break
        before |= more
    through_parameters = {"generate", "pretrain", "generate_chat", "pretrain_chat"}  # named by `inputs`, `chat_data`
    assert set(stages) - before <= through_parameters
