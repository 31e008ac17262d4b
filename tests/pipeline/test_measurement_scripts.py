"""Efficiency, energy, the cost of HOSVD and cost curves as DVC runs them; tables and figures from their records."""

import csv
import json
import runpy
from pathlib import Path

import pytest
import yaml

BY_HAND = ["device=cpu", "name=test", "progress=false"]
ENERGY = ["scale=energy/smoke", "scale.batch_size=4", "scale.refresh_batches=2"]
CURVES = ["results=true", "scale=cost_curves/smoke", "scale.base={hidden: 8, inner: 32, tokens: 16, density: 0.05}",
          "scale.densities=[0.2]", "scale.tokens=[4]", "scale.widths=[16]", "scale.rounds=2"]  # fmt: skip
OF_ENERGY = ("figure_02", "figure_03", "figure_energy")


@pytest.fixture
def arguments(tiny_checkpoint, glue_root):
    """Of the stages that need a model and tasks."""
    return ["model=tiny_bert", f"model.checkpoint={tiny_checkpoint}", f"data.root={glue_root}", *BY_HAND]


@pytest.fixture
def bases(arguments):
    """More of them where bases are made."""
    settings = {"preliminary.steps": 2, "preliminary.batch_size": 8, "density": 0.05}
    return [*arguments, *(f"protocol.{key}={value}" for key, value in settings.items())]


@pytest.fixture
def efficiency(arguments):
    """More of them of the efficiency stage."""
    return [*arguments[:-1], "scale=efficiency/smoke", "scale.batches=1", "scale.rounds=2", "batch_size=4"]


@pytest.fixture
def lists(tmp_path):
    """An experiment of one task and all figures."""
    figures = [*OF_ENERGY, "figure_efficiency", "figure_cost_curves"]
    content = {"name": "test", "protocol": "sound", "tasks": ["cola"], "efficiency_models": ["tiny_bert"]}
    stands = {"bert_base": "tiny_bert", "roberta_base": None, "roberta_large": None, "llama2_7b": None}
    content |= {"seeds": [1], "figures": figures, "stands_for": stands}
    (tmp_path / "work" / "params.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture
def well(script):
    """``well(name, ...)``: the script ends well and says nothing on standard output."""

    def run(name, *overrides):
        done = script(name, *overrides)
        assert done.code == 0 and done.out == "", done.err
        return done

    return run


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def test_everything_is_measured_once_and_drawn(well, bases, efficiency, lists, tmp_path):
    root = tmp_path / "work" / "results" / "test"
    for stage in ("gradients", "basis"):
        well(stage, "cell=params.yaml", "wandb.mode=disabled", *bases)
    energy = ["cell=params.yaml", "basis=results/test/basis/tiny_bert", *bases, *ENERGY, "scale.steps=[0,2,3]"]
    speed = ["cell=params.yaml", *efficiency, "variants=[full,lora,folded]"]
    stages = {"energy": energy, "efficiency": speed, "cost_curves": [*BY_HAND, *CURVES]}
    for stage, overrides in stages.items():
        well(stage, *overrides)
    well("figure", "figure=all", "name=test")
    assert len(list((root / "energy" / "tiny_bert").iterdir())) == 4
    record = json.loads((root / "efficiency" / "tiny_bert" / "cola.json").read_text())
    assert record["run"]["experiment"] == "test" and record["run"]["scale"] == "smoke"
    assert "training split" in record["lengths"]["source"] and record["lengths"]["examples"] > 4
    run = json.loads((root / "cost_curves.json").read_text())["run"]
    assert run == run | {"experiment": "test", "kind": "cost_curves", "scale": "smoke"}

    words = {name: json.loads((root / "figures" / f"{name}.json").read_text()) for name in OF_ENERGY}
    for found in words.values():
        assert "tiny BERT stands in BERT's place" in found["notes"][0] and found["source"]
        assert all((tmp_path / "work" / path).is_file() for path in found["source"])
    for name, source in (
        ("figure_efficiency", "efficiency/tiny_bert/cola.json"),
        ("figure_cost_curves", "cost_curves.json"),
    ):
        assert f"results/test/{source}" in json.loads((root / "figures" / f"{name}.json").read_text())["source"]
    assert len(list((root / "figures").iterdir())) == 5 * 3

    before = contents(root)
    (root / "efficiency" / "tiny_bert" / "rte.json").write_text("{}")  # of a task that is no longer the experiment's
    said = {stage: well(stage, *overrides).err for stage, overrides in stages.items()}
    assert contents(root) == before
    counts = {stage: err.count("is finished, reused") for stage, err in said.items()}
    assert counts == {"energy": 2, "efficiency": 1, "cost_curves": 1}

    well("table", "number=7", "name=test")
    with (root / "tables" / "table_07.csv").open(newline="") as file:
        cells = {(row["row"], row["column"]): row for row in csv.DictReader(file)}
    assert float(cells["LoRA", "CoLA"]["ours"]) > 0 and cells["LoRA", "CoLA"]["n"] == "2"
    assert cells["SparseGrad, Regular", "CoLA"]["verdict"] == "not run"


@pytest.mark.slow
def test_by_hand(well, efficiency):
    done = well("efficiency", *efficiency, "data.task=mrpc", "variants=[full]")
    assert (done.folder / "outputs" / "test" / "efficiency" / "tiny_bert" / "mrpc.json").is_file()
    well("efficiency", *efficiency, "data.task=mrpc", "lengths_only=true")
    lengths = json.loads((done.folder / "outputs" / "test" / "lengths" / "tiny_bert" / "mrpc.json").read_text())
    assert lengths["task"] == "mrpc" and sum(lengths["counts"].values()) > 4

    case = "scale.cases={tiny: {shape: [24, 16], asked: 4, ways: {streaming: [4], unfoldings_float32: []}}}"
    done = well("hosvd_cost", case, *BY_HAND)
    found = json.loads((done.folder / "outputs" / "test" / "hosvd_cost.json").read_text())
    entries = {entry["way"]: entry for entry in found["cases"][0]["entries"]}
    assert entries["streaming"]["status"] == "finished" and entries["streaming"]["peak_bytes"] >= 0
    assert entries["unfoldings_float32"]["status"] == "not run"
    assert "streaming / unfoldings_float32, 4 gradients: time unknown" in done.err


@pytest.mark.parametrize(
    ("name", "overrides", "text"),
    [
        ("cost_curves", ["scale.rounds=0", "device=cpu"], "scale.rounds=0; allowed: greater than or equal to 1."),
        ("efficiency", ["variants=[nope]"], "variants=['nope']; allowed"),
        ("efficiency", ["cell=nowhere.yaml"], "there is no nowhere.yaml"),
        ("energy", ENERGY, "run the gradients and basis stages"),
        ("figure", ["figure=nope", "name=test"], "figure='nope'; allowed: all, figure_02"),
        ("figure", ["figure=figure_02", "name=other"], "is experiment 'test', not 'other'"),
        ("figure", ["figure=figure_02", "name=test"], "holds no record of cola: run the energy stage"),
        ("figure", ["figure=figure_efficiency", "name=test"], "no finished record of full fine-tuning"),
        ("figure", ["figure=figure_cost_curves", "name=test"], "cost_curves.json does not exist"),
        ("figure", ["figure=methods_scores", "name=test"], "statistics.json does not exist"),
    ],
)
def test_wrong_input(name, overrides, text, script, lists, bases, efficiency):
    given = {"efficiency": efficiency, "energy": bases}.get(name, [])
    done = script(name, *given, *overrides)
    assert done.code != 0 and text in done.err and "Traceback" not in done.err, done.err


@pytest.mark.slow
def test_adapters_are_saved_and_loaded_in_every_way(tmp_path):
    """The script's own check: what is loaded computes what was trained."""
    root = Path(__file__).parents[2]
    main = runpy.run_path(str(root / "experiments" / "adapter_sizes.py"))["main"]
    model = root / "conf" / "model" / "tiny_bert.yaml"
    main(["--output", str(tmp_path), "sizes", "--model", str(model), "--repeats", "1"])
    rows = json.loads((tmp_path / "adapters.json").read_text())["rows"]
    assert len(rows) == 8
    for row in rows:
        assert row["save_seconds"] > 0 and row["load_seconds"] > 0
        assert row["logits_error"] < 1e-2 or "largest" in row["name"], row
