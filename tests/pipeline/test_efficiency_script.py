"""The efficiency stage as DVC runs it, on the tiny checkpoint and tasks; tables and a figure from its records."""

import csv
import json

import pytest
import yaml


@pytest.fixture
def arguments(tiny_checkpoint, glue_root):
    return [
        "model=tiny_bert",
        f"model.checkpoint={tiny_checkpoint}",
        f"data.root={glue_root}",
        "scale=efficiency/smoke",
        "scale.batches=1",
        "scale.rounds=2",
        "batch_size=4",
        "device=cpu",
        "name=test",
    ]


@pytest.fixture
def lists(tmp_path):
    """An experiment file of two tasks."""
    (tmp_path / "work").mkdir(exist_ok=True)
    content = {"name": "test", "protocol": "sound", "tasks": ["cola", "mrpc"], "efficiency_models": ["tiny_bert"]}
    content["stands_for"] = {"bert_base": "tiny_bert", "roberta_base": None, "roberta_large": None, "llama2_7b": None}
    (tmp_path / "work" / "params.yaml").write_text(yaml.safe_dump(content))


def test_a_cell_is_measured_once_and_makes_three_tables_and_a_figure(script, arguments, lists):
    arguments = ["cell=params.yaml", *arguments, "variants=[full,lora,folded]"]
    done = script("efficiency", *arguments)
    assert done.code == 0, done.err
    folder = done.folder / "results" / "test" / "efficiency" / "tiny_bert"
    assert sorted(path.name for path in folder.iterdir()) == ["cola.json", "mrpc.json"]
    found = json.loads((folder / "cola.json").read_text())
    assert found["run"]["experiment"] == "test" and found["run"]["scale"] == "smoke"
    assert "training split" in found["lengths"]["source"] and found["lengths"]["examples"] > 4
    before = (folder / "cola.json").read_bytes()
    (folder / "rte.json").write_text("{}")
    done = script("efficiency", *arguments)
    assert done.code == 0 and "cola.json is finished, reused" in done.err
    assert (folder / "cola.json").read_bytes() == before and not (folder / "rte.json").exists()
    for number in (3, 7, 8):
        done = script("table", f"number={number}", "name=test")
        assert done.code == 0 and done.out == "", done.err
    with (done.folder / "results" / "test" / "tables" / "table_07.csv").open(newline="") as file:
        cells = {(row["row"], row["column"]): row for row in csv.DictReader(file)}
    assert float(cells["LoRA", "CoLA"]["ours"]) > 0 and cells["LoRA", "CoLA"]["n"] == "2"
    assert cells["SparseGrad, Regular", "CoLA"]["verdict"] == "not run"
    done = script("figure", "figure=figure_efficiency", "name=test")
    assert done.code == 0 and done.out == "", done.err
    words = json.loads((done.folder / "results" / "test" / "figures" / "figure_efficiency.json").read_text())
    assert words["source"] == [f"results/test/efficiency/tiny_bert/{task}.json" for task in ("cola", "mrpc")]


def test_by_hand_and_lengths_only(script, arguments):
    done = script("efficiency", *arguments, "data.task=mrpc", "variants=[full]")
    assert done.code == 0, done.err
    assert (done.folder / "outputs" / "test" / "efficiency" / "tiny_bert" / "mrpc.json").is_file()
    done = script("efficiency", *arguments, "data.task=mrpc", "lengths_only=true")
    assert done.code == 0, done.err
    lengths = json.loads((done.folder / "outputs" / "test" / "lengths" / "tiny_bert" / "mrpc.json").read_text())
    assert lengths["task"] == "mrpc" and sum(lengths["counts"].values()) > 4


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["variants=[nope]"], "variants=['nope']; allowed"),
        (["scale.rounds=0"], "rounds=0; it must be a whole number"),
        (["data.task=nope"], "data.task='nope'"),
        (["cell=params.yaml"], "params.yaml does not exist"),
    ],
)
def test_wrong_input(overrides, text, script, arguments):
    done = script("efficiency", *arguments, *overrides)
    assert done.code != 0 and text in done.err and "Traceback" not in done.err, done.err
