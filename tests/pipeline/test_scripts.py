"""The scripts as a user and DVC run them: what they leave, what they say, what they do after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def files(folder):
    """All files below a folder, as paths relative to it; locks and Hydra's own left out."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.startswith("outputs/hydra/") and not name.endswith(".lock"))


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def experiment(tmp_path):
    """params.yaml in the folder where the scripts run."""

    def write(**content):
        lists = {"name": "test", "tasks": ["cola"], "seeds": [1, 2]} | content
        (tmp_path / "work" / "params.yaml").write_text(yaml.safe_dump(lists))

    return write


# One run, several runs


@pytest.mark.parametrize("method", ["meprop", "sparsegrad"])  # the others: below
def test_a_run_leaves_its_record_says_its_score_and_is_reused(method, script, tiny):
    run = ["train", *tiny, f"method={method}", "data.task=mrpc", "seed=3"]
    done = script(*run)
    assert done.code == 0, done.err
    (path,) = (done.folder / "outputs" / "hand" / "tiny_bert" / method).iterdir()
    record = read(path)
    assert (record["status"], record["run"]["task"], record["run"]["seed"]) == ("finished", "mrpc", 3)
    assert done.out == "" and f"accuracy = {record['score']:.4f}" in done.err
    again = script(*run)
    assert again.code == 0 and "is finished, reused" in again.err and read(path) == record
    assert files(done.folder) == [f"outputs/hand/tiny_bert/{method}/{path.name}"]


def test_multirun_over_methods_and_seeds_to_another_folder(script, tiny, tmp_path):
    output = tmp_path / "elsewhere"
    done = script("train", "-m", *tiny, "method=full,lora", "seed=1,2", f"output={output}", "name=mine")
    assert done.code == 0, done.err
    found = [read(path)["run"] for path in output.rglob("*.json")]
    expected = [("mine", method, seed) for method in ("full", "lora") for seed in (1, 2)]
    assert sorted((run["experiment"], run["method"], run["seed"]) for run in found) == expected
    assert files(done.folder) == []


def test_another_precision_and_offline_tracking_below_outputs(script, tiny):
    done = script("train", *tiny, "method=full", "wandb.mode=offline", "scale.precision=bf16")
    assert done.code == 0, done.err
    assert [name for name in files(done.folder) if name.endswith(".wandb")]
    assert {name.split("/")[0] for name in files(done.folder)} == {"outputs"}


# Cells, as DVC runs them


def test_stages_of_a_cell(script, tiny, experiment):
    experiment(tasks=["cola", "stsb"])
    cell = [*tiny, "cell=params.yaml", "name=test", "method=sparsegrad", "batch_size=null"]
    results = script("gradients", *cell).folder / "results" / "test"
    assert files(results) == ["gradients/tiny_bert/cola.safetensors", "gradients/tiny_bert/stsb.safetensors"]
    assert script("basis", "cell=params.yaml", "name=test", "model=tiny_bert", "device=cpu").code == 0
    assert [p.name for p in sorted((results / "basis" / "tiny_bert").iterdir())] == [
        "cola.safetensors",
        "hosvd.json",
        "stsb.safetensors",
    ]
    cell.append("basis=results/test/basis/tiny_bert")
    done = script("search", *cell)
    assert done.code == 0, done.err
    found = read(results / "search" / "tiny_bert" / "sparsegrad" / "stsb.json")
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 2
    done = script("train", *cell)
    assert done.code == 0, done.err
    runs = results / "runs" / "tiny_bert" / "sparsegrad"
    listed = read(runs / "cell.json")["records"]
    assert [name.split("-")[:2] for name in listed] == [[t, s] for t in ("cola", "stsb") for s in ("seed1", "seed2")]
    records = {name: read(runs / name) for name in listed}
    assert all(record["basis"]["task"] == record["run"]["task"] for record in records.values())
    best = {
        task: read(results / "search" / "tiny_bert" / "sparsegrad" / f"{task}.json")["best"]
        for task in ("cola", "stsb")
    }
    for record in records.values():
        assert record["hyperparameters"]["learning_rate"] == best[record["run"]["task"]]["learning_rate"]
    assert {name.split("/")[0] for name in files(done.folder)} == {"params.yaml", "results"}

    before = {path: path.stat().st_mtime_ns for path in (results / "runs").rglob("*-seed*.json")}
    assert script("train", *cell).code == 0 and script("search", *cell).code == 0
    assert len(before) == 4 and {path: path.stat().st_mtime_ns for path in before} == before


def test_cell_in_which_a_run_fails_ends_with_an_error_and_leaves_the_others(script, tiny, experiment):
    experiment(seeds=[1])
    cell = [*tiny, "cell=params.yaml", "name=test", "method=full", "batch_size=null"]
    assert script("search", *cell).code == 0
    done = script("train", *cell, "learning_rate=1.0e+30")
    assert done.code == 1 and "Traceback" not in done.err
    assert "error: 1 of 2 searches and runs failed; cola-seed1-" in done.err and "lower learning_rate=1e+30" in done.err
    runs = done.folder / "results" / "test" / "runs" / "tiny_bert" / "full"
    assert [read(runs / name)["status"] for name in read(runs / "cell.json")["records"]] == ["failed"]
    assert script("train", *cell).code == 0


# Errors


ERRORS = {
    "model": (["model=nope"], "Could not find 'model/nope'"),
    "key": (["learning_rat=1"], "Could not override 'learning_rat'. (nearest: learning_rate)"),
    "added key": (["+scale.epoch=3"], "scale.epoch: there is no such option; nearest: epochs."),
    "name": (["model.name=../../x"], "model.name='../../x'; allowed: a name"),
    "task without files": (["data.task=rte"], "could not be loaded from the hub"),
    "data": (["data.root=/no/such/folder"], "/no/such/folder/glue/cola does not exist"),
    "checkpoint": (["model.checkpoint=/no/such/folder"], "model.checkpoint='/no/such/folder' is no folder"),
    "k": (["protocol.density=null", "model.k=2049", "method=sparsegrad"], "k=2049; a matrix of shape (64, 32)"),
    "rank": (["model.lora_rank=33", "method=lora"], "lora_rank=33; allowed: 1 to 32"),
    "targets": (["model.target_modules.up='nope(?P<layer>1)'"], "target_modules.up='nope(?P<layer>1)' matches no"),
    "length": (["protocol.padding=max_length"], "inputs of 128 tokens; this model has 40 positions"),
    "learning rate": (["learning_rate=0"], "learning_rate=0; allowed: greater than 0."),
    "missing basis": (["method=sparsegrad", "basis=no/such/file"], "no/such/file does not exist"),
    "damaged basis": (["method=sparsegrad", "basis=damaged.safetensors"], "damaged.safetensors is damaged"),
    "cell": (["cell=no.yaml"], "there is no no.yaml; its folder has"),
    "search's seed": (["cell=params.yaml"], "seed 34 is the search's"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_input_is_one_clear_error_and_leaves_nothing(case, script, tiny, experiment, tmp_path):
    overrides, text = ERRORS[case]
    experiment(seeds=[1, 34])
    (tmp_path / "work" / "damaged.safetensors").write_bytes(b"no safetensors")
    done = script("train", *tiny, "method=full", *overrides)
    assert done.code != 0 and text in done.err, done.err
    assert "Traceback" not in done.err and done.out == ""
    if "error:" in done.err:
        assert len([line for line in done.err.splitlines() if line.startswith("error: ")]) == 1
    assert files(done.folder) == ["damaged.safetensors", "params.yaml"]


@pytest.mark.parametrize(
    ("name", "overrides", "text"),
    [
        ("gradients", ["data.root=/no/such/folder"], "/no/such/folder/glue/cola does not exist"),
        ("gradients", ["protocol.preliminary.steps=0"], "protocol.preliminary.steps=0; allowed: greater than or equal"),
        ("basis", [], "gradients/tiny_bert/cola.safetensors does not exist: run the stage that writes it"),
        ("search", ["protocol.search.learning_rate=[1.0, 0.1]"], "learning_rate=[1.0, 0.1]; allowed: [low, high]"),
        ("search", ["data.root=/no/such/folder"], "/no/such/folder/glue/cola does not exist"),
    ],
)
def test_wrong_input_of_a_stage(name, overrides, text, script, tiny, experiment):
    experiment()
    done = script(name, *tiny, "method=full", "cell=params.yaml", "name=test", *overrides)
    assert done.code != 0 and text in done.err, done.err
    assert "Traceback" not in done.err and done.out == ""
    assert files(done.folder) == ["params.yaml"]


def test_a_file_of_a_group_that_holds_anothers_name_is_refused(script, tmp_path):
    """Its results would lie in the other's folder. A name given by hand may be any."""
    folder = tmp_path / "conf" / "model"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text((ROOT / "conf" / "model" / "tiny_bert.yaml").read_text())
    given = ["--config-dir", str(folder.parent), "model=mine", "data.root=/no/such/folder"]
    done = script("train", *given)
    assert done.code == 1 and "error: conf/model/mine.yaml: name='tiny_bert'; allowed: that of the file" in done.err
    assert "/no/such/folder/models/tiny_bert does not exist" in script("train", *given, "model.name=mine").err


# A real kill


def test_killed_run_ends_as_an_unbroken_one(script, tiny):
    arguments = [*tiny, "method=sparsegrad", "scale.max_steps=60", "scale.evaluation_steps=10", "learning_rate=0.002"]
    whole = script("train", *arguments, "output=whole", "checkpoints=whole/checkpoints")
    assert whole.code == 0, whole.err
    arguments.append("scale.checkpoint_seconds=0")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / "train.py"), *arguments, "output=killed"],
        cwd=whole.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    checkpoints = whole.folder / "outputs" / "checkpoints"
    try:
        deadline = time.monotonic() + 200
        while not list(checkpoints.glob("*/step_0000001*")):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.stderr.close()
        assert process.wait() == -signal.SIGKILL
    assert not list(whole.folder.glob("killed/**/*.json"))
    again = script("train", *arguments, "output=killed")
    assert again.code == 0, again.err
    (expected,), (found,) = (
        [read(path) for path in whole.folder.glob(f"{name}/tiny_bert/*/*.json")] for name in ("whole", "killed")
    )
    assert found["training"]["resumed"] >= 1 and expected["training"]["resumed"] == 0
    for key in ("score", "metric", "evaluations", "parameters", "basis", "run"):
        assert found[key] == expected[key]
    assert not list(checkpoints.glob("*"))
