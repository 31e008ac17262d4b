"""The decoder's stages as DVC runs them, one after the other, on a LLaMA of random weights: gradients to Table 6."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).resolve().parents[2] / "experiments"
MODEL = ["model=llama2_7b", "model.name=tiny", "model.folder=models/tiny", "model.layers_to_transform=[0,3]",
         "model.lora_rank=2", "model.k=40"]  # fmt: skip
SIZES = ["scale=llama/smoke", "scale.max_length=32", "scale.batch_size=8", "scale.micro_batch_size=8", "name=test"]
TRAIN = ["--config-name", "chat", *MODEL, *SIZES,
         "chat=generated_chat", "protocol.preliminary.steps=3", "scale.max_steps=4", "device=cpu",
         "scale.evaluation_steps=2", "progress=false", "wandb.mode=disabled"]  # fmt: skip
BENCH = [*MODEL, *SIZES, "scale.answers.max_new_tokens=5", "questions=generated", "device=cpu", "progress=false"]


@pytest.fixture
def work(script, tmp_path, chat_root):
    folder = tmp_path / "work"
    shutil.copytree(chat_root, folder / "results" / "test" / "chat")
    (folder / "conf").symlink_to(SCRIPTS.parent / "conf")
    content = {"name": "test", "protocol": "sound", "decoder_seeds": [1, 2], "stands_for": {"llama2_7b": "tiny"}}
    content["methods"] = ["full", "sparsegrad"]
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_from_gradients_to_table_6(script, work):
    def done(name, *arguments):
        ran = script(name, *arguments)
        assert ran.code == 0, (name, ran.err[-3000:])

    basis = "results/test/basis/tiny"
    done("gradients", *TRAIN, "cell=params.yaml")
    done("basis", *TRAIN, "cell=params.yaml")
    for method in ("full", "sparsegrad"):
        done("train", *TRAIN, f"method={method}", f"basis={basis}", "cell=params.yaml")
    done("answers", *BENCH, "cell=params.yaml")
    done("judgments", *BENCH, "judge=local", "cell=params.yaml")
    done("table", "number=6", "name=test", "questions=generated")
    done("examples", "name=test", "questions=generated")

    results = work / "results" / "test"
    with (results / "tables" / "table_06.csv").open() as file:
        cells = {(row["row"], row["column"]): row for row in csv.DictReader(file)}
    record = json.loads(next((results / "runs" / "tiny" / "full").glob("oasst1-seed1-*.json")).read_text())
    share = 100 * record["parameters"]["trainable"] / record["parameters"]["total"]
    assert float(cells["Regular FT", "#Train params"]["ours"]) == pytest.approx(share)
    loss, score = cells["SparseGrad", "Valid Loss"], cells["SparseGrad", "I-Bench Score"]
    assert loss["n"] == "2" and loss["paper"] == "1.247" and loss["verdict"] == "not comparable"
    assert 1 <= float(score["ours"]) <= 10 and score["verdict"] == "not comparable"
    assert "no measure of quality" in score["source"] and cells["MeProp", "Valid Loss"]["verdict"] == "not run"
    page = (results / "examples.html").read_text()
    assert "sparsegrad" in page.lower() and "not a measure of quality" in page

    before = contents(results)
    for method in ("full", "sparsegrad"):
        done("train", *TRAIN, f"method={method}", f"basis={basis}", "cell=params.yaml")
    done("answers", *BENCH, "cell=params.yaml")
    done("judgments", *BENCH, "judge=local", "cell=params.yaml")
    assert contents(results) == before  # what is finished is not done again


def test_by_hand(script, work):
    ran = script("train", *TRAIN, "chat.root=results/test/chat", "method=sparsegrad", "seed=3")
    assert ran.code == 0 and "loss = " in ran.err and "(before: " in ran.err
    assert (work / "outputs" / "test" / "tiny" / "sparsegrad" / "seed3" / "model.safetensors").is_file()
    ran = script("answers", *BENCH, "method=sparsegrad", "seed=3")
    assert ran.code == 0, ran.err
    ran = script("judgments", *BENCH, "method=sparsegrad", "seed=3", "judge=local")
    assert ran.code == 0, ran.err


@pytest.mark.slow
def test_of_two_processes_the_first_writes(work, ranks):
    """As ``accelerate launch`` and torchrun start them; that they take one process' steps is tested with the runs."""
    own = ["method=sparsegrad", "output=two", "checkpoints=two/checkpoints", "scale.micro_batch_size=4"]
    own += ["scale.checkpoint_seconds=0", "wandb.mode=offline"]
    command = [sys.executable, str(SCRIPTS / "train.py"), *TRAIN, "chat.root=results/test/chat", *own]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, text=True, env=environment | ranks(rank))
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    [path] = (work / "two").rglob("oasst1-seed1-*.json")
    record = json.loads(path.read_text())
    assert record["status"] == "finished" and record["device"]["processes"] == 2 and len(record["evaluations"]) == 2
    assert (path.parent / "seed1" / "model.safetensors").is_file()
    assert not list((work / "two" / "checkpoints").glob("*/*")) and len(list(work.rglob("*.wandb"))) == 1


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("train", "model.template=null", "template"),
        ("train", "model.template=nonsense", "nonsense"),
        ("train", "chat.threads=some", "threads"),
        ("train", "basis=nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("train", "cell=nowhere.yaml", "there is no nowhere.yaml"),
        ("basis", "name=other", "run the stage that writes it"),
        ("answers", "seed=9", "train seed 9 first"),
        ("judgments", "seed=9", "seed9.jsonl does not exist: run the stage"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_1(name, change, told, script, work):
    common = BENCH if name in ("answers", "judgments") else TRAIN
    extra = ["judge=local"] if name == "judgments" else []
    ran = script(name, *common, "method=sparsegrad", *extra, change)
    assert ran.code == 1 and ran.err.strip().splitlines()[-1].startswith("error: ") and told in ran.err, ran.err
    assert "Traceback" not in ran.err
