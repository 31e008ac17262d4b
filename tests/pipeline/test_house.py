"""A fifth method by one YAML file, a ninth task by one entry, a second decoder by one YAML file: found everywhere.

A copy of configuration, scripts and stages gets the three files and an experiment that names them. The commands are
those of dvc.yaml, in its order, at sizes of seconds.
"""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from finetune.report.model import read_table
from finetune.store.experiment import write_params
from finetune.store.records import iterate

pytestmark = pytest.mark.timeout(1200)  # half a minute on free cores
ROOT = Path(__file__).resolve().parents[2]
METHOD = {"name": "shards", "label": "MiSS", "base": "peft", "config": "MissConfig", "match": "r"}
TASK = {"title": "WNLI", "columns": ["sentence1", "sentence2"], "num_labels": 2, "metric": "accuracy"}
DECODER = {
    "name": "tiny_qwen",
    "title": "tiny Qwen",
    "architecture": {"model_type": "qwen2", "num_key_value_heads": 2},
    "folder": "models/tiny_qwen",
}
EXPERIMENT = {
    "scale": "smoke",
    "data": "generated",
    "tasks": ["cola", "wnli"],
    "seeds": [1, 2],
    "methods": ["full", "sparsegrad", "shards"],
    "models": ["tiny_bert"],
    "decoders": ["tiny_llama", "tiny_qwen"],
    "decoder_seeds": [1],
    "chat": "generated_chat",
    "questions": "generated",
    "judge": "local",
    "generate": True,
    "pretrain": ["tiny_bert", "tiny_llama", "tiny_qwen"],
    "stands_for": {"bert_base": "tiny_bert", "llama2_7b": "tiny_llama"},
}
SIZES = {
    "conf/generate.yaml": {
        "glue": {"corpus_sentences": 400, "train": 64, "validation": 40},
        "chat": {"trees": 200, "dialogues": 400},
    },
    "conf/pretrain.yaml": {"encoder": {"steps": 2}, "decoder": {"steps": 2}},
    "conf/scale/smoke.yaml": {
        "max_steps": 4,
        "evaluation_steps": 2,
        "search": {"trials": 1, "max_steps": 2, "points": [{"learning_rate": 5e-4, "batch_size": 32}]},
    },
    "conf/scale/llama/smoke.yaml": {
        "max_steps": 2,
        "evaluation_steps": 1,
        "warmup_steps": 1,
        "max_length": 64,
        "answers": {"max_new_tokens": 4},
        "judging": {"repeats": 1},
    },
    "conf/protocol/sound.yaml": {"preliminary": {"steps": 2}},
    "conf/protocol/llama/sound.yaml": {"preliminary": {"steps": 2}},
}
LEFT_OUT = ("energy", "efficiency", "hosvd_cost", "cost_curves", "figures")  # they name no method of an experiment


def merged(content, changes):
    return content | {
        key: merged(content[key], value) if isinstance(value, dict) and key in content else value
        for key, value in changes.items()
    }


def edit(path, changes):
    path.write_text(yaml.safe_dump(merged(yaml.safe_load(path.read_text()), changes), sort_keys=False))


@pytest.fixture(scope="module")
def house(run_in, tmp_path_factory):
    """The copy, after its stages have run."""
    from dvc.repo import Repo

    folder = tmp_path_factory.mktemp("house")
    for name in ("conf", "experiments"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
    for name, changes in SIZES.items():
        edit(folder / name, changes)
    # The three additions.
    (folder / "conf/method/shards.yaml").write_text(yaml.safe_dump(METHOD))
    edit(folder / "conf/data/generated.yaml", {"tasks": {"wnli": TASK}})
    llama = yaml.safe_load((folder / "conf/model/tiny_llama.yaml").read_text())
    (folder / "conf/model/tiny_qwen.yaml").write_text(yaml.safe_dump(merged(llama, DECODER)))
    (folder / "experiments/house.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    write_params(folder / "experiments/house.yaml", folder / "params.yaml", folder / "conf")
    with Repo(str(folder)) as repo:
        order = list(repo.index.stages)
    for stage in order:
        if stage.name.partition("@")[0] in LEFT_OUT:
            continue
        words = shlex.split(stage.cmd.replace("workers=auto", "workers=1"))
        done = run_in(folder, folder / words[1], *words[2:])
        assert done.code == 0, (stage.name, done.err[-2000:])
        if stage.name.startswith("generate"):
            glue = folder / "results/house/data/glue"
            shutil.copytree(glue / "mrpc", glue / "wnli")
    for last in (["plan", "experiment=experiments/house.yaml"], ["figure", "figure=methods_scores", "name=house"]):
        done = run_in(folder, folder / f"experiments/{last[0]}.py", *last[1:])
        assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def results(house):
    return house / "results" / "house"


def test_they_have_records(results):
    runs = [record["run"] for _, record in iterate(results / "runs")]
    found = {(run["model"], run["method"], run["task"], run["seed"]) for run in runs}
    methods = EXPERIMENT["methods"]
    expected = {("tiny_bert", m, t, s) for m in methods for t in EXPERIMENT["tasks"] for s in EXPERIMENT["seeds"]}
    expected |= {(d, m, "oasst1", 1) for d in EXPERIMENT["decoders"] for m in methods}
    assert found == expected


def test_they_stand_in_the_tables(results):
    scores = read_table(results / "tables" / "table_09.json")
    for row in ("Regular FT", "SparseGrad", "MiSS"):
        cell = scores.cell(row, "WNLI")
        assert cell is not None and cell.value is not None and cell.n == 2 and not cell.paper, row
    assert scores.cell("MiSS", "CoLA").value is not None
    tables = [read_table(path) for path in sorted((results / "tables").glob("table_06*.json"))]
    cells = [cell for table in tables for cell in table.cells if cell.model == "tiny_qwen"]
    assert any("MiSS" in cell.row and cell.quantity == "loss" and cell.value is not None for cell in cells)


def test_they_stand_in_the_statistics(results):
    statistics = json.loads((results / "statistics.json").read_text())
    (entry,) = statistics["runs"]
    assert set(entry["comparison"]["methods"]["shards"]["tasks"]) == {"cola", "wnli"}
    pairs = {(p["first"], p["second"]) for family in entry["comparison"]["families"] for p in family["pairs"]}
    assert ("sparsegrad", "shards") in pairs
    assert {decoder["model"] for decoder in statistics["decoders"]} == {"tiny_llama", "tiny_qwen"}
    assert all("shards" in decoder["comparison"]["methods"] for decoder in statistics["decoders"])


def test_they_stand_in_the_figure(results):
    svg = (results / "figures" / "methods_scores.svg").read_text()
    assert ">MiSS, AVG<" in svg and ">WNLI<" in svg


def test_they_stand_in_the_plan(house):
    plan = json.loads((house / "outputs/plan/house.json").read_text())
    steps = {(s["model"], s["method"]): (s["runs"], s["steps"]) for s in plan["stages"] if s["stage"] == "train"}
    assert steps["tiny_bert", "shards"] == (4, 16) and steps["tiny_qwen", "shards"] == (1, 2)
    assert {("tiny_bert", "shards"), ("tiny_qwen", "shards")} < {
        (one["model"], one["method"]) for one in plan["memory"]
    }
    assert "files in" in plan["sources"]["rows of wnli"]


def test_they_stand_on_the_page(results):
    page = (results / "report.html").read_text()
    assert all(page.count(word) > 2 for word in ("MiSS", "WNLI", "tiny Qwen"))
    page = (results / "examples.html").read_text()
    assert all(word in page for word in ("MiSS", "tiny Qwen", "not a measure of quality"))
