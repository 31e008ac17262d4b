"""Runs and cells: what is finished is reused, what fails is told, what decides a number is in its hash."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from finetune.runs import cells, execution
from finetune.runs import glue as run
from finetune.runs.glue import Inputs, identity, train_run
from finetune.store import records
from finetune.training.evaluation import evaluate
from finetune.training.loop import NonFiniteLoss, make_accelerator

BEST = {"learning_rate": 1e-3, "batch_size": 8}
TIMES = ("seconds", "step_seconds_median", "resumed")


class Killed(BaseException):
    """Like a signal: nothing may catch it."""


@pytest.fixture
def places(tmp_path):
    """Folders of a cell: records, and a search that is done for every task."""
    for task in ("cola", "mrpc", "stsb"):
        records.write_json(tmp_path / "search" / f"{task}.json", {"best": BEST | {"value": 0.1, "trial": 0}})
    return tmp_path / "runs", tmp_path / "search"


@pytest.fixture
def cell(config, places):
    """``cell("method=lora", tasks=["cola"], seeds=[1, 2])``: a call of train_cell; gives the folder of its records."""

    def make(*overrides, tasks=("cola", "mrpc"), seeds=(1, 2)):
        cells.train_cell(config("method=full", *overrides), list(tasks), list(seeds), *places)
        return places[0]

    return make


@pytest.fixture
def trained(monkeypatch):
    """The (task, seed) of every run that is really done from here on."""
    done = []

    def note(inputs, task, seed, chosen, **others):
        done.append((task, seed))
        return train_run(inputs, task, seed, chosen, **others)

    monkeypatch.setattr(cells, "train_run", note)
    return done


def diverge(monkeypatch, *seeds):
    """Let the runs of these seeds fail."""
    train = execution.train

    def fail(*arguments, label="", **others):
        if any(label.endswith(f"seed {seed}") for seed in seeds):
            raise NonFiniteLoss("loss is nan at step 3; lower learning_rate=0.001 or check the data.")
        return train(*arguments, label=label, **others)

    monkeypatch.setattr(execution, "train", fail)


def without_times(record):
    kept = {key: value for key, value in record.items() if key != "provenance"}
    return kept | {"training": {key: value for key, value in record["training"].items() if key not in TIMES}}


# Cells


def test_cell_runs_tasks_by_seeds_and_lists_them(cell, trained):
    folder = cell()
    assert trained == [("cola", 1), ("cola", 2), ("mrpc", 1), ("mrpc", 2)]
    found = dict(records.iterate(folder))
    assert [(r["run"]["task"], r["run"]["seed"], r["status"]) for r in found.values()] == [
        (task, seed, "finished") for task, seed in trained
    ]
    for path, record in found.items():
        facts = record["run"]
        assert path.name == f"{facts['task']}-seed{facts['seed']}-{facts['config_hash']}.json"
    assert sorted(p.name for p in folder.iterdir()) == sorted([p.name for p in found] + ["cell.json"])


def test_second_call_trains_nothing_and_changes_nothing(cell, monkeypatch):
    folder = cell()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(cells, "train_run", refuse)
    cell()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_extended_cell_runs_what_is_missing(cell, trained):
    cell(tasks=["cola"], seeds=[1])
    folder = cell(tasks=["cola", "mrpc"], seeds=[1, 2])
    assert trained == [("cola", 1), ("cola", 2), ("mrpc", 1), ("mrpc", 2)]
    assert len(records.read_json(folder / "cell.json")["records"]) == 4


def test_shortened_cell_lists_what_is_asked(cell):
    cell(tasks=["cola"], seeds=[1, 2])
    folder = cell(tasks=["cola"], seeds=[2])
    assert [record["run"]["seed"] for _, record in records.iterate(folder)] == [2]
    assert len(list((folder / "earlier").glob("cola-seed1-*.json"))) == 1


def test_changed_configuration_moves_the_old_records_to_earlier(cell, trained):
    folder = cell(tasks=["cola"])
    old = records.read_json(folder / "cell.json")["records"]
    cell("protocol.weight_decay=0.01", tasks=["cola"])
    new = records.read_json(folder / "cell.json")["records"]
    assert len(trained) == 4 and not set(old) & set(new)
    assert sorted(p.name for p in folder.glob("*-seed*.json")) == sorted(new)
    assert sorted(p.name for p in (folder / "earlier").iterdir()) == sorted(old)


def test_failed_runs_are_recorded_the_others_done_and_the_call_ends_with_an_error(cell, places, monkeypatch):
    with monkeypatch.context() as patch:
        diverge(patch, 1)
        text = r"2 of 4 runs failed; cola-seed1-[0-9a-f]{12}.json: loss is nan at step 3; lower .*; mrpc-seed1-"
        with pytest.raises(ValueError, match=text):
            cell()
    states = {(r["run"]["task"], r["run"]["seed"]): r["status"] for _, r in records.iterate(places[0])}
    assert states == {
        (task, seed): "failed" if seed == 1 else "finished" for task in ("cola", "mrpc") for seed in (1, 2)
    }


def test_failed_record_says_why_and_has_no_score(cell, places, monkeypatch):
    diverge(monkeypatch, 1)
    with pytest.raises(ValueError, match="1 of 1 runs failed"):
        cell(tasks=["cola"], seeds=[1])
    ((_, record),) = records.iterate(places[0])
    assert (record["status"], record["score"], record["metric"]) == ("failed", None, "matthews_correlation")
    assert record["error"].startswith("loss is nan at step 3")


def test_only_what_failed_is_tried_again(cell, places, trained, monkeypatch):
    with monkeypatch.context() as patch:
        diverge(patch, 2)
        with pytest.raises(ValueError, match="1 of 2 runs failed"):
            cell(tasks=["cola"])
    cell(tasks=["cola"])
    assert trained == [("cola", 1), ("cola", 2), ("cola", 2)]
    assert {record["status"] for _, record in records.iterate(places[0])} == {"finished"}


@pytest.mark.parametrize("learning_rate", [1e30, 3e38])
def test_learning_rate_that_destroys_the_model_is_a_failed_run(method_name, learning_rate, config):
    found = config(f"method={method_name}")
    record = train_run(Inputs(found), "cola", 1, {"learning_rate": learning_rate, "batch_size": 8})
    assert record["status"] == "failed" and f"lower learning_rate={learning_rate}" in record["error"]
    json.dumps(record, allow_nan=False)
    assert not list(Path(found["checkpoints"]).glob("*"))


def test_seed_of_the_search_is_no_seed_of_the_report(cell, places, trained):
    with pytest.raises(ValueError, match=r"seed 34 is the search's; seeds=\[1, 34\] must be others\."):
        cell(seeds=[1, 34])
    assert not trained and not places[0].exists()


def test_killed_cell_keeps_its_finished_records(cell, places, trained, monkeypatch):
    evaluations = []

    def kill(*arguments):
        evaluations.append(arguments)
        if len(evaluations) == 4:  # two evaluations a run: the second run dies in its last one
            raise Killed
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", kill)
        with pytest.raises(Killed):
            cell("scale.checkpoint_seconds=0", tasks=["cola"])
    assert len(list(places[0].glob("cola-seed*.json"))) == 1
    folder = cell("scale.checkpoint_seconds=0", tasks=["cola"])
    assert trained == [("cola", 1), ("cola", 2), ("cola", 2)]
    assert [record["training"]["resumed"] for _, record in records.iterate(folder)] == [0, 1]


# Hyper-parameters


def test_values_by_hand_win_over_the_search_and_the_search_over_the_scale(config, places):
    found = config("learning_rate=null", "batch_size=null")
    scale = {name: found["scale"][name] for name in ("learning_rate", "batch_size")}
    assert cells.hyperparameters(found, None) == scale
    assert cells.hyperparameters(found, places[1] / "cola.json") == BEST
    by_hand = found | {"learning_rate": 5e-5}
    assert cells.hyperparameters(by_hand, places[1] / "cola.json") == {"learning_rate": 5e-5, "batch_size": 8}


def test_missing_search(cell, places):
    (places[1] / "mrpc.json").unlink()
    with pytest.raises(ValueError, match=r"mrpc.json does not exist: run the stage that writes it\."):
        cell()


# Records


def test_record_holds_what_tables_and_readers_need(method_name, config):
    found = config(f"method={method_name}", "protocol.density=null", "model.k=20")
    record = train_run(Inputs(found), "mrpc", 1, BEST)
    json.dumps(record, allow_nan=False)
    assert (record["schema"], record["version"], record["status"], record["error"]) == (
        1,
        found["version"],
        "finished",
        None,
    )
    assert record["run"] == {
        "experiment": "hand",
        "kind": "train",
        "model": "tiny_bert",
        "method": method_name,
        "task": "mrpc",
        "seed": 1,
        "protocol": "sound",
        "scale": "smoke",
        "config_hash": records.config_hash(identity(Inputs(found), "mrpc", 1, BEST, "train")),
    }
    assert record["metric"] == "accuracy" and 0 <= record["score"] <= 1
    assert set(record["parameters"]) == {"total", "trainable", "trainable_per_layer", "wrapped_layers"}
    entries = {"full": 2048, "lora": 96, "meprop": 20, "sparsegrad": 20}[method_name]
    assert record["parameters"]["trainable_per_layer"] == entries and record["parameters"]["wrapped_layers"] == 4
    assert record["model"]["title"] == "tiny BERT" and record["model"]["random_weights"] is False
    assert record["hyperparameters"] == BEST
    assert record["data"]["rows"] == {"train": 40, "validation": 24}
    assert record["treatment"]["target_matrices"] == 4
    steps = [evaluation["step"] for evaluation in record["evaluations"]]
    assert steps == [3, 6] and set(record["evaluations"][0]) == {"step", "loss", "accuracy", "f1"}
    assert record["score"] == max(evaluation["accuracy"] for evaluation in record["evaluations"])
    training = record["training"]
    assert (training["steps"], training["planned_steps"], training["stopped"]) == (6, 6, "all steps done")
    assert training["epochs"] == pytest.approx(6 * 8 / 40) and training["step_seconds_median"] > 0
    assert set(record["memory"]) >= {"parameters", "gradients", "optimizer_state", "bases", "saved_activations"}
    assert (record["memory"]["bases"] > 0) == (method_name == "sparsegrad")
    assert record["provenance"]["packages"]["torch"] and record["device"]["type"] == "cpu"
    assert not list(Path(found["checkpoints"]).glob("*"))


def test_same_run_twice_gives_the_same_record(method_name, config):
    found = config(f"method={method_name}")
    one, other = (train_run(Inputs(found), "cola", 1, BEST) for _ in range(2))
    assert without_times(one) == without_times(other)


def test_seed_decides_the_numbers(config):
    inputs = Inputs(config("method=full"))
    losses = [train_run(inputs, "cola", seed, BEST)["evaluations"][0]["loss"] for seed in (1, 2)]
    assert losses[0] != losses[1]


def test_killed_run_gives_the_record_of_an_unbroken_one(method_name, config, monkeypatch):
    found = config(f"method={method_name}", "scale.checkpoint_seconds=0")
    whole = train_run(Inputs(found), "cola", 1, BEST)

    def kill(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", kill)
        with pytest.raises(Killed):
            train_run(Inputs(found), "cola", 1, BEST)
    assert list(Path(found["checkpoints"]).glob("*/step_*"))
    again = train_run(Inputs(found), "cola", 1, BEST)
    assert again["training"]["resumed"] == 1
    assert without_times(again) == without_times(whole)
    assert not list(Path(found["checkpoints"]).glob("*"))


def test_released_protocol_collects_in_the_run_and_keeps_the_stepped_weights(config):
    overrides = ("method=sparsegrad", "protocol=released", "protocol.max_length=32", "model.k=20")
    found = config(*overrides, "protocol.preliminary.learning_rate=0.01")
    record = train_run(Inputs(found), "cola", 1, BEST)
    assert record["basis"]["gradients"] == {"up": 4, "down": 4} and record["basis"]["seed"] == 1
    kept = record["evaluations"][0]["loss"]
    found = config(*overrides, "protocol.preliminary.learning_rate=0.01", "protocol.preliminary.keep_weights=false")
    assert train_run(Inputs(found), "cola", 1, BEST)["evaluations"][0]["loss"] != kept


def test_basis_of_the_stage_is_that_of_the_preliminary_phase(config, tmp_path):
    found = config("method=sparsegrad")
    cells.gradients_cell(found, ["cola"], tmp_path / "gradients")
    cells.basis_cell(["cola"], tmp_path / "gradients", tmp_path / "basis", device="cpu", threads=None)
    record = train_run(Inputs(found | {"basis": str(tmp_path / "basis")}), "cola", 1, BEST)
    assert record["basis"]["task"] == "cola" and record["basis"]["seed"] == 34
    collected = train_run(Inputs(found), "cola", 34, BEST)
    from_file = train_run(Inputs(found | {"basis": str(tmp_path / "basis")}), "cola", 34, BEST)
    losses = [[evaluation["loss"] for evaluation in r["evaluations"]] for r in (collected, from_file)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_saved_model_is_plain_and_scores_as_recorded(method_name, task, config, tmp_path):
    from transformers import AutoModelForSequenceClassification

    inputs = Inputs(config(f"method={method_name}"))
    record = train_run(inputs, task, 1, {"learning_rate": 5e-3, "batch_size": 8}, save_model=tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", local_files_only=True)
    facts, splits = inputs.task(task)
    score = evaluate(model, splits["validation"], facts, 32, torch.device("cpu"))[facts.metric]
    assert score == pytest.approx(record["score"], abs=1e-4 if task == "stsb" else 1e-9)


def test_bf16_autocast_runs(method_name, config):
    record = train_run(Inputs(config(f"method={method_name}", "scale.precision=bf16")), "cola", 1, BEST)
    assert record["status"] == "finished" and record["treatment"]["precision"] == "bf16"
    make_accelerator("cpu", "fp32")  # for the tests after this one


def test_scope_accumulation_schedule_and_clipping_reach_the_run(method_name, config):
    overrides = ("protocol.train=mlp", "scale.accumulation_steps=2", "protocol.schedule=linear")
    found = config(f"method={method_name}", *overrides, "protocol.max_grad_norm=1.0")
    record = train_run(Inputs(found), "cola", 1, BEST)
    assert record["status"] == "finished" and record["treatment"]["train"] == "mlp"
    assert record["parameters"]["trainable"] < record["parameters"]["total"] / 2


def test_inputs_longer_than_the_model_are_an_error_that_says_so(method_name, config):
    found = config(f"method={method_name}", "protocol.padding=max_length", "protocol.max_length=128")
    text = r"inputs of 128 tokens; this model has 40 positions: set protocol.max_length=40 or less\."
    with pytest.raises(ValueError, match=text):
        train_run(Inputs(found), "cola", 1, BEST)


def test_run_by_hand_leaves_its_record_under_output_and_is_reused(config, trained):
    found = config("method=full", "data.task=mrpc", "seed=5")
    score = cells.run_one(found)
    (path,) = (Path(found["output"]) / "tiny_bert" / "full").iterdir()
    assert path.name.startswith("mrpc-seed5-") and records.read_json(path)["score"] == score
    assert cells.run_one(found) == score and trained == [("mrpc", 5)]


def test_run_by_hand_that_fails_is_an_error_with_its_record(config):
    found = config("method=full", "learning_rate=1e30")
    with pytest.raises(ValueError, match=r"cola-seed1-[0-9a-f]{12}.json: loss is nan at step"):
        cells.run_one(found)
    (path,) = (Path(found["output"]) / "tiny_bert" / "full").iterdir()
    assert records.read_json(path)["status"] == "failed"


# What the hash says


def digest(found, seed=1, chosen=BEST, kind="train", task="cola"):
    return records.config_hash(identity(Inputs(found), task, seed, chosen, kind))


def test_where_things_are_does_not_change_the_hash(config, tiny_checkpoint, glue_root, tmp_path):
    expected = digest(config("method=full"))
    model = shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere")
    data = shutil.copytree(glue_root, tmp_path / "data")
    moved = config("method=full", f"model.checkpoint={model}", f"data.root={data}")
    assert digest(moved) == expected
    for change in ({"output": "x"}, {"checkpoints": "x"}, {"threads": 1}, {"progress": True}, {"device": "auto"}):
        assert digest(config("method=full") | change) == expected
    assert digest(config("method=full", "scale.checkpoint_seconds=1", "wandb.mode=offline", "name=other")) == expected


@pytest.mark.parametrize(
    "override",
    [
        "version=99",
        "method=lora",
        "model.k=5",
        "model.lora_rank=2",
        "model.layers_to_transform=[0]",
        "model.target_modules.up=x",
        "protocol.density=0.1",
        "protocol.orientation=released",
        "protocol.hosvd=tensorly",
        "protocol.preliminary.steps=3",
        "protocol.preliminary.update=true",
        "protocol.train=mlp",
        "+protocol.frozen.full=[LayerNorm]",
        "protocol.lora_scale=3.0",
        "protocol.meprop_optimizer=adamw",
        "protocol.epochs=3",
        "protocol.patience=1",
        "protocol.schedule=linear",
        "protocol.weight_decay=0.1",
        "protocol.max_grad_norm=1.0",
        "protocol.precision=bf16",
        "protocol.padding=max_length",
        "protocol.max_length=16",
        "scale.train_examples=20",
        "scale.max_steps=7",
        "scale.evaluation_steps=2",
        "scale.accumulation_steps=2",
        "scale.precision=bf16",
    ],
)
def test_what_decides_numbers_changes_the_hash(override, config):
    assert digest(config("method=full", override)) != digest(config("method=full"))


def test_data_weights_seed_and_hyperparameters_change_the_hash(config, tmp_path, write_task, tiny_checkpoint):
    found = config("method=full")
    expected = digest(found)
    assert digest(found, seed=2) != expected
    assert digest(found, kind="search") != expected
    assert digest(found, chosen=BEST | {"learning_rate": 2e-3}) != expected
    assert digest(found, task="mrpc") != expected
    write_task(tmp_path, "cola", seed=5)
    assert digest(config("method=full", f"data.root={tmp_path}")) != expected
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert digest(config("method=full", f"model.checkpoint={model}")) != expected


def test_basis_of_a_stage_and_of_the_run_itself_are_two_runs(config):
    found = config("method=sparsegrad")
    assert digest(found | {"basis": "some/folder"}) != digest(found)
    full = config("method=full")
    assert digest(full | {"basis": "some/folder"}) == digest(full)


# Searches


@pytest.fixture
def search(config, tmp_path):
    """``search("scale.search.trials=3", ...)``: a search of CoLA; gives its summary."""

    def make(*overrides, tasks=("cola",)):
        small = ("scale.search.max_steps=4", "scale.evaluation_steps=2", "learning_rate=null", "batch_size=null")
        points = "scale.search.points=[{learning_rate: 0.001, batch_size: 8}, {learning_rate: 0.01, batch_size: 8}]"
        found = config("method=full", *small, points, "scale.search.trials=3", *overrides)
        cells.search_cell(found, tasks, tmp_path / "searches")
        return records.read_json(tmp_path / "searches" / "cola.json")

    return make


def test_search_leaves_a_journal_and_a_summary(search, tmp_path):
    found = search(tasks=("cola", "mrpc"))
    names = ["cola.journal", "cola.json", "mrpc.journal", "mrpc.json"]
    assert sorted(p.name for p in (tmp_path / "searches").iterdir()) == names
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 3
    assert [trial["learning_rate"] for trial in found["trials"][:2]] == [0.001, 0.01]
    assert list(found["trials"][0]["intermediate"]) == ["2", "4"]
    assert found["run"]["kind"] == "search" and found["run"]["method"] == "full" and found["seed"] == 34
    assert found["best"]["value"] == max(trial["value"] for trial in found["trials"])
    assert found["n_trials"] == 3 and found["provenance"]["python"]


def test_search_is_extended_not_repeated(search, trained):
    first = search()["trials"]
    search()
    assert len(trained) == 3
    assert search("scale.search.trials=4")["trials"][:3] == first and len(trained) == 4


def test_search_seed_is_the_protocols(search, trained):
    search("protocol.search_seed=77")
    assert trained == [("cola", 77)] * 3


def test_diverged_trials_count_and_lose(search):
    points = "scale.search.points=[{learning_rate: 1.0e+30, batch_size: 8}, {learning_rate: 0.001, batch_size: 8}]"
    found = search(points, "protocol.search.learning_rate=[1.0e-06, 1.0e+31]", "scale.search.trials=2")
    assert [trial["state"] for trial in found["trials"]] == ["diverged", "complete"]
    assert found["best"]["learning_rate"] == 0.001


def test_search_in_which_all_diverge_says_what_to_lower(search):
    points = "scale.search.points=[{learning_rate: 1.0e+30, batch_size: 8}]"
    with pytest.raises(ValueError, match=r"no trial of 1 completed .*: lower search.learning_rate"):
        search(points, "protocol.search.learning_rate=[1.0e+29, 1.0e+31]", "scale.search.trials=1")


def test_pruned_trials_leave_no_checkpoint(search, tmp_path, monkeypatch):
    scores = iter([0.9, 0.9, 0.1, 0.1, 0.1, 0.1])

    def scripted(*_):
        return {"loss": 0.5, "matthews_correlation": next(scores)}

    monkeypatch.setattr(run, "evaluate", scripted)
    pruning = "scale.search.pruning={startup_trials: 1, warmup_steps: 0}"
    found = search(pruning, "scale.checkpoint_seconds=0")
    assert [trial["state"] for trial in found["trials"]] == ["complete", "pruned", "pruned"]
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_killed_trial_goes_on_from_its_checkpoint(search, tmp_path, monkeypatch, trained):
    seen = []

    def kill(*arguments):
        seen.append(arguments)
        if len(seen) == 4:
            raise Killed
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", kill)
        with pytest.raises(Killed):
            search("scale.checkpoint_seconds=0")
    assert list((tmp_path / "checkpoints").glob("*/step_*"))
    broken = search("scale.checkpoint_seconds=0")
    assert len(trained) == 4
    assert not list((tmp_path / "checkpoints").glob("*"))
    shutil.rmtree(tmp_path / "searches")
    whole = search("scale.checkpoint_seconds=0")
    for one, other in zip(broken["trials"], whole["trials"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_cell_trains_with_what_the_search_found(search, config, tmp_path, places):
    best = search()["best"]
    found = config("method=full", "learning_rate=null", "batch_size=null")
    cells.train_cell(found, ["cola"], [1], places[0], tmp_path / "searches")
    ((_, record),) = records.iterate(places[0])
    assert record["hyperparameters"] == {name: best[name] for name in ("learning_rate", "batch_size")}


@pytest.mark.parametrize("override", ["protocol.weight_decay=0.1", "scale.search.max_steps=5", "method=lora"])
def test_another_configuration_searches_anew(override, search, trained):
    search()
    found = search(override)
    assert len(trained) == 6 and len(found["trials"]) == 3


# Experiment files, locks and errors


def write(path, text):
    path.write_text(text)
    return path


def test_lists_of_an_experiment(tmp_path):
    path = write(tmp_path / "params.yaml", "name: a\ntasks: [cola]\nseeds: [1, 2]\nmodels: [x]\n")
    assert cells.read_lists(path) == {"tasks": ["cola"], "seeds": [1, 2]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("tasks: [cola]\n", r"params.yaml: 'seeds' is None; it must be a list of at least one\."),
        ("tasks: []\nseeds: [1]\n", r"params.yaml: 'tasks' is \[\]; it must be a list of at least one\."),
        ("tasks: cola\nseeds: [1]\n", r"params.yaml: 'tasks' is 'cola'; it must be a list of at least one\."),
        ("", r"params.yaml: 'tasks' is None"),
        ("- cola\n", r"params.yaml .* no mapping"),
        ("tasks: [cola\n", r"params.yaml is no YAML"),
    ],
)
def test_experiment_file_that_does_not_fit(content, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        cells.read_lists(write(tmp_path / "params.yaml", content))


def test_missing_experiment_file(tmp_path):
    with pytest.raises(ValueError, match=r"params.yaml does not exist; a cell needs an experiment file"):
        cells.read_lists(tmp_path / "params.yaml")


def test_cell_has_one_writer(tmp_path):
    folder = Path("results/local/runs/minilm/full")
    with cells.only_writer(folder, tmp_path):
        text = r"results/local/runs/minilm/full: another process is working on this cell; wait for it, or end it\."
        with pytest.raises(ValueError, match=text), cells.only_writer(folder, tmp_path):
            pass
        with cells.only_writer(Path("results/local/runs/minilm/lora"), tmp_path):
            pass
    with cells.only_writer(folder, tmp_path):
        pass


@pytest.mark.parametrize("error", [ValueError("what is wrong"), ImportError("what is wrong")])
def test_users_errors_become_one_line(error):
    with pytest.raises(SystemExit, match="^error: what is wrong$"), cells.exit_with_message():
        raise error


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), Killed()])
def test_programming_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), cells.exit_with_message():
        raise error
