"""One run, of GLUE or on dialogues: what its record and its hash say, and that a kill loses nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from finetune.runs.cells import Cell
from finetune.runs.chat import ChatProblem
from finetune.runs.glue import GlueProblem
from finetune.runs.preliminary import basis_cell, gradients_cell
from finetune.runs.problem import Run
from finetune.training.evaluation import evaluate
from finetune.training.processes import make_accelerator

BEST = {"learning_rate": 1e-3, "batch_size": 8}
TASKS = ("cola", "oasst1")


def test_record_holds_what_tables_and_readers_need(method_name, once, config, tmp_path):
    change = (f"method={method_name}", "protocol.density=null", "model.k=20")
    record = once(*change, task="mrpc")
    json.dumps(record, allow_nan=False)
    head = (record["schema"], record["version"], record["status"], record["error"])
    assert head == (1, config()["version"], "finished", None)
    assert record["run"] == {
        "experiment": "hand",
        "kind": "train",
        "model": "tiny_bert",
        "method": method_name,
        "task": "mrpc",
        "seed": 1,
        "protocol": "sound",
        "scale": "smoke",
        "config_hash": GlueProblem(config(*change)).digest(Run("mrpc", 1, BEST)),
    }
    assert record["metric"] == "accuracy" and 0 <= record["score"] <= 1
    assert set(record["parameters"]) == {"total", "trainable", "trainable_per_layer", "wrapped_layers"}
    entries = {"full": 2048, "lora": 96, "meprop": 20, "sparsegrad": 20}[method_name]
    assert record["parameters"]["trainable_per_layer"] == entries and record["parameters"]["wrapped_layers"] == 4
    assert record["model"]["title"] == "tiny BERT" and record["model"]["random_weights"] is False
    assert record["hyperparameters"] == BEST
    assert record["data"]["rows"] == {"train": 40, "validation": 24} and record["treatment"]["target_matrices"] == 4
    steps = [evaluation["step"] for evaluation in record["evaluations"]]
    assert steps == [3, 6] and set(record["evaluations"][0]) == {"step", "loss", "accuracy", "f1"}
    assert record["score"] == max(evaluation["accuracy"] for evaluation in record["evaluations"])
    training = record["training"]
    assert (training["steps"], training["planned_steps"], training["stopped"]) == (6, 6, "all steps done")
    assert training["epochs"] == pytest.approx(6 * 8 / 40) and training["step_seconds_median"] > 0
    assert set(record["memory"]) >= {"parameters", "gradients", "optimizer_state", "bases", "saved_activations"}
    assert (record["memory"]["bases"] > 0) == (method_name == "sparsegrad")
    assert record["provenance"]["packages"]["torch"] and record["device"]["type"] == "cpu"
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_gives_the_record_of_an_unbroken_one(task, method_name, once, numbers, killed, tmp_path):
    """Bit for bit, weights too; two unbroken runs are the same, of course."""

    def run(name):
        return once(f"method={method_name}", "scale.checkpoint_seconds=0", task=task, keep=tmp_path / name)

    whole, again = run("whole"), run("again")
    killed(3 if task == "oasst1" else 2, lambda: run("resumed"))  # dialogues are evaluated before training too
    assert list((tmp_path / "checkpoints").glob("*/step_*")) and not (tmp_path / "resumed").exists()
    resumed = run("resumed")
    assert resumed["training"]["resumed"] == 1 and numbers(resumed) == numbers(whole) == numbers(again)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides_the_numbers(task, once):
    losses = [once("method=full", task=task, seed=seed)["evaluations"][0]["loss"] for seed in (1, 2)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("learning_rate", [1e30, 3e38])
def test_a_learning_rate_that_destroys_the_model_is_a_failed_run(method_name, learning_rate, once, tmp_path):
    record = once(f"method={method_name}", chosen={"learning_rate": learning_rate, "batch_size": 8})
    assert record["status"] == "failed" and f"lower learning_rate={learning_rate}" in record["error"]
    json.dumps(record, allow_nan=False)
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_a_kept_model_is_plain_and_scores_as_recorded(method_name, task, once, config, tmp_path):
    from transformers import AutoModelForSequenceClassification

    record = once(f"method={method_name}", task=task, chosen=BEST | {"learning_rate": 5e-3}, keep=tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", local_files_only=True)
    problem = GlueProblem(config())
    facts, split = problem.facts(task), problem.splits(task)["validation"]
    score = evaluate(model, split, facts, 32, torch.device("cpu"))[facts.metric]
    assert score == pytest.approx(record["score"], abs=1e-4 if task == "stsb" else 1e-9)


def test_scope_accumulation_schedule_clipping_and_autocast_reach_the_run(method_name, once):
    change = ("protocol.train=mlp", "scale.accumulation_steps=2", "protocol.schedule=linear", "scale.precision=bf16")
    record = once(f"method={method_name}", *change, "protocol.max_grad_norm=1.0")
    assert record["status"] == "finished"
    assert (record["treatment"]["train"], record["treatment"]["precision"]) == ("mlp", "bf16")
    assert record["parameters"]["trainable"] < record["parameters"]["total"] / 2
    make_accelerator("cpu", "fp32")  # for the tests after this one


# Bases


def test_released_protocol_collects_in_the_run_and_keeps_the_stepped_weights(once):
    change = ("method=sparsegrad", "protocol=released", "protocol.max_length=32", "model.k=20",
              "protocol.preliminary.learning_rate=0.01")  # fmt: skip
    record = once(*change)
    assert record["basis"]["gradients"] == {"up": 4, "down": 4} and record["basis"]["seed"] == 1
    dropped = once(*change, "protocol.preliminary.keep_weights=false")
    assert dropped["evaluations"][0]["loss"] != record["evaluations"][0]["loss"]


def test_basis_of_the_stage_is_that_of_the_preliminary_phase(once, config, tmp_path, monkeypatch):
    cell = Cell(GlueProblem(config("method=sparsegrad")), ["cola"], [], tmp_path)
    gradients_cell(cell)
    basis_cell(cell)
    given = f"basis={tmp_path / 'basis' / 'tiny_bert'}"
    record = once("method=sparsegrad", given)
    assert record["basis"]["task"] == "cola" and record["basis"]["seed"] == 34
    found = [once("method=sparsegrad", *change, seed=34)["evaluations"] for change in ([], [given])]
    assert [e["loss"] for e in found[0]] == pytest.approx([e["loss"] for e in found[1]], abs=1e-5)


def test_bases_of_other_training_data_are_refused(config, tmp_path, write_task):
    cell = Cell(GlueProblem(config()), ["cola"], [], tmp_path)
    gradients_cell(cell)
    basis_cell(cell)
    write_task(tmp_path, "cola", seed=5)
    other = GlueProblem(config(f"data.root={tmp_path}") | {"basis": str(tmp_path / "basis" / "tiny_bert")})
    with pytest.raises(ValueError, match="was made with data="):
        other.bases("cola")


# Identity


def digest(found, seed=1, chosen=BEST, search=False, task="cola"):
    return GlueProblem(found).digest(Run(task, seed, chosen, search))


def test_where_things_are_does_not_change_the_hash(config, tiny_checkpoint, glue_root, tmp_path):
    expected = digest(config("method=full"))
    model = shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere")
    data = shutil.copytree(glue_root, tmp_path / "data")
    moved = config("method=full", f"model.checkpoint={model}", f"data.root={data}")
    assert digest(moved) == expected
    for change in ({"output": "x"}, {"threads": 1}, {"workers": 2}, {"progress": True}, {"device": "auto"}):
        assert digest(config("method=full") | {"checkpoints": "x"} | change) == expected
    assert digest(config("method=full", "scale.checkpoint_seconds=1", "wandb.mode=offline", "name=other")) == expected
    assert digest(config("method=full", "method.label=Other", "+method.control=true")) == expected


@pytest.mark.parametrize(
    "override",
    ["version=99", "method=lora", "model.k=5", "model.lora_rank=2", "model.layers_to_transform=[0]",
     "model.target_modules.up=x", "protocol.density=0.1", "protocol.orientation=released", "protocol.hosvd=tensorly",
     "protocol.preliminary.steps=3", "protocol.preliminary.update=true", "protocol.train=mlp",
     "+protocol.frozen.full=[LayerNorm]", "protocol.lora_scale=3.0", "protocol.meprop_optimizer=adamw",
     "protocol.epochs=3", "protocol.patience=1", "protocol.schedule=linear", "protocol.weight_decay=0.1",
     "protocol.max_grad_norm=1.0", "protocol.precision=bf16", "protocol.padding=max_length", "protocol.max_length=16",
     "scale.train_examples=20", "scale.max_steps=7", "scale.evaluation_steps=2", "scale.accumulation_steps=2",
     "scale.precision=bf16"],
)  # fmt: skip
def test_what_decides_numbers_changes_the_hash(override, config):
    assert digest(config("method=full", override)) != digest(config("method=full"))


def test_data_weights_seed_and_hyperparameters_change_the_hash(config, tmp_path, write_task, tiny_checkpoint):
    found = config("method=full")
    hashes = [digest(found), digest(found, seed=2), digest(found, search=True), digest(found, task="mrpc")]
    hashes.append(digest(found, chosen=BEST | {"learning_rate": 2e-3}))
    write_task(tmp_path, "cola", seed=5)
    hashes.append(digest(config("method=full", f"data.root={tmp_path}")))
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    hashes.append(digest(config("method=full", f"model.checkpoint={model}")))
    assert len(set(hashes)) == 7


def test_bases_are_no_matter_of_a_method_without_them(config):
    full = config("method=full")
    assert digest(full | {"basis": "some/folder"}) == digest(full)


def test_the_hash_of_a_run_on_dialogues_holds_what_decides_numbers_and_nothing_else(chat_config):
    def of(*overrides, seed=1):
        problem = ChatProblem(chat_config(*overrides))
        return problem.digest(Run("oasst1", seed, problem.hyperparameters()))

    same = ["scale.evaluation_batch_size=5", "scale.gradient_checkpointing=false", "scale.threads=2", "device=auto",
            "scale.answers.max_new_tokens=3", "chat.source=elsewhere", "model.title=Other", "workers=2"]  # fmt: skip
    other = ["scale.max_steps=7", "scale.micro_batch_size=8", "learning_rate=0.1", "batch_size=4", "method=lora",
             "chat.threads=best", "protocol.loss_on=all", "scale.max_length=48", "protocol.preliminary.steps=4",
             "model.k=41", "model.template=vicuna_v1.1", "version=9"]  # fmt: skip
    base = of()
    assert {of(change) for change in same} == {base}
    assert len({of(change) for change in other} | {base, of(seed=2)}) == len(other) + 2


# Hyper-parameters


def test_values_by_hand_win_over_the_search_and_the_search_over_the_scale(config):
    found = config("learning_rate=null", "batch_size=null")
    assert GlueProblem(found).hyperparameters() == {k: found["scale"][k] for k in ("learning_rate", "batch_size")}
    assert GlueProblem(found).hyperparameters(BEST | {"value": 0.1}) == BEST
    by_hand = GlueProblem(found | {"learning_rate": 5e-5})
    assert by_hand.hyperparameters(BEST) == {"learning_rate": 5e-5, "batch_size": 8}
    with pytest.raises(ValueError, match="learning_rate=-0.1; allowed: a number greater than 0"):
        GlueProblem(found).hyperparameters(BEST | {"learning_rate": -0.1})
    found["scale"]["learning_rate"] = None
    with pytest.raises(ValueError, match="learning_rate=None; allowed: a number"):
        GlueProblem(found).hyperparameters()


def test_hyperparameters_may_be_given_by_method(chat_config):
    def of(*overrides):
        return ChatProblem(chat_config(*overrides))

    change = ("learning_rate=null", "scale.learning_rate={lora: 0.1, full: 0.2}")
    assert of("method=full", *change).hyperparameters() == {"learning_rate": 0.2, "batch_size": 8}
    with pytest.raises(ValueError, match="learning_rate is given for lora, full; method=meprop needs one too"):
        of("method=meprop", *change).hyperparameters()
    by_base = ("method=truncated", "learning_rate=null", "scale.learning_rate={sparsegrad: 0.3}")
    assert of(*by_base).hyperparameters()["learning_rate"] == 0.3
    assert of(*by_base, "+scale.learning_rate.truncated=0.4").hyperparameters()["learning_rate"] == 0.4


def test_the_protocols_interval_of_evaluation_holds_at_batch_16(config):
    problem = GlueProblem(config("scale.evaluation_steps=null"))
    found = {size: problem.options(Run("cola", 1, BEST | {"batch_size": size}), 1) for size in (8, 16, 32)}
    assert {size: options.evaluation_steps for size, options in found.items()} == {8: 200, 16: 100, 32: 50}


def test_inputs_longer_than_the_model_are_an_error_that_says_so(once):
    text = r"inputs of 128 tokens; this model has 40 positions: set protocol.max_length=40 or less\."
    with pytest.raises(ValueError, match=text):
        once("protocol.padding=max_length", "protocol.max_length=128")
