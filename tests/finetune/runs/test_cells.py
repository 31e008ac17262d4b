"""Cells: what is finished is reused, what fails is told, a search comes first, a kill loses nothing."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune.runs import glue
from finetune.runs.cells import run_by_hand, search_cell, train_cell
from finetune.runs.preliminary import basis_cell, gradients_cell
from finetune.store import records
from finetune.training.evaluation import Evaluation

FOUR = [("cola", 1), ("cola", 2), ("mrpc", 1), ("mrpc", 2)]
DONE = [("cola", 1), ("mrpc", 1), ("cola", 2), ("mrpc", 2)]  # the first seed of all tasks comes first
SMALL = (
    "scale.search.max_steps=4", "scale.evaluation_steps=2", "learning_rate=null", "batch_size=null",
    "scale.search.points=[{learning_rate: 0.001, batch_size: 8}, {learning_rate: 0.01, batch_size: 8}]",
    "scale.search.trials=3",
)  # fmt: skip


@pytest.fixture
def train(cell_of):
    """``train("method=lora", tasks=..., seeds=...)``: a call of train_cell; gives the folder of its records."""

    def make(*overrides, **others):
        cell = cell_of("method=full", *overrides, **others)
        train_cell(cell)
        return cell.folder("runs")

    return make


def scored(score):
    """An evaluation of CoLA's 24 rows."""
    rows = np.zeros(24, np.int64)
    return Evaluation({"loss": 0.5, "matthews_correlation": score}, rows, rows)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_cell_runs_tasks_by_seeds_once_and_lists_them(train, trained, read, tmp_path):
    folder = train(tasks=["cola", "mrpc"])
    assert trained == DONE and list(read(folder)) == FOUR
    for path, record in records.iterate(folder):
        facts = record["run"]
        assert path.name == f"{facts['task']}-seed{facts['seed']}-{facts['config_hash']}.json"
    assert len(list(folder.iterdir())) == 5
    assert all((tmp_path / kind / "tiny_bert" / "full").is_dir() for kind in ("search", "runs", "models"))
    before = contents(tmp_path)
    train(tasks=["cola", "mrpc"])
    assert trained == DONE and contents(tmp_path) == before


def test_a_cell_that_grows_runs_what_is_missing_and_one_that_shrinks_puts_the_rest_aside(train, trained, read):
    train(seeds=[1])
    folder = train(tasks=["cola", "mrpc"])
    assert trained == DONE and list(read(folder)) == FOUR
    train(seeds=[2])
    assert list(read(folder)) == [("cola", 2)] and len(list((folder / "earlier").iterdir())) == 3


def test_another_configuration_moves_the_old_records_to_earlier(train, trained):
    folder = train()
    old = records.read_json(folder / "cell.json")["records"]
    train("protocol.weight_decay=0.01")
    new = records.read_json(folder / "cell.json")["records"]
    assert len(trained) == 4 and not set(old) & set(new)
    assert sorted(p.name for p in folder.glob("*-seed*.json")) == sorted(new)
    assert sorted(p.name for p in (folder / "earlier").iterdir()) == sorted(old)


def test_a_record_under_anothers_hash_is_not_taken_for_it(train, trained):
    """A file with the right task and seed, whose name carries another run's hash."""
    folder = train(seeds=[1])
    [path] = folder.glob("cola-seed1-*.json")
    path.rename(folder / "cola-seed1-0123456789ab.json")
    train(seeds=[1])
    assert trained == [("cola", 1)] * 2 and path.is_file()


def test_a_record_that_a_table_would_refuse_is_made_anew(train, trained, read, numbers):
    folder = train(seeds=[1, 2, 3, 4])
    before = {key: numbers(record) for key, record in read(folder).items()}
    paths = {int(path.name.split("seed")[1][0]): path for path in folder.glob("*-seed*.json")}
    kept = {seed: records.read_record(path) for seed, path in paths.items()}
    records.write_record(paths[1], kept[1] | {"score": str(kept[1]["score"])})
    records.write_record(paths[2], kept[2] | {"schema": 2})
    records.write_json(paths[3], kept[3] | {"score": 0.9})
    paths[4].write_text(paths[4].read_text().replace('"score": ', '"score": NaN, "was": '))
    for path in paths.values():
        with pytest.raises(ValueError, match=path.name):
            records.read_record(path)
    train(seeds=[1, 2, 3, 4])
    assert trained == [("cola", seed) for seed in (1, 2, 3, 4)] * 2
    assert {key: numbers(record) for key, record in read(folder).items()} == before


def test_failed_runs_are_recorded_the_others_done_and_tried_again(train, trained, read, diverge, tmp_path):
    text = (
        r"2 of 4 searches and runs failed; cola-seed1-[0-9a-f]{12}.json: loss is nan at step 3; lower .*; mrpc-seed1-"
    )
    with diverge(1), pytest.raises(ValueError, match=text):
        train(tasks=["cola", "mrpc"])
    folder = tmp_path / "runs" / "tiny_bert" / "full"
    found = read(folder)
    assert {key: r["status"] == "failed" for key, r in found.items()} == {key: key[1] == 1 for key in FOUR}
    bad = found["cola", 1]
    assert (bad["score"], bad["metric"]) == (None, "matthews_correlation") and bad["error"].startswith("loss is nan")
    train(tasks=["cola", "mrpc"])
    assert {record["status"] for record in read(folder).values()} == {"finished"}
    assert trained == [*DONE, ("cola", 1), ("mrpc", 1)]


def test_the_searchs_seed_is_no_seed_of_the_report(train, trained, tmp_path):
    with pytest.raises(ValueError, match=r"seed 34 is the search's; seeds=\[1, 34\] must be others\."):
        train(seeds=[1, 34])
    assert not trained and not (tmp_path / "runs").exists()


def test_a_killed_cell_keeps_its_finished_records_and_resumes(train, trained, read, killed):
    killed(4, lambda: train("scale.checkpoint_seconds=0"))  # two evaluations a run: the second run's last
    folder = train("scale.checkpoint_seconds=0")
    assert trained == [("cola", 1), ("cola", 2), ("cola", 2)]
    assert [record["training"]["resumed"] for record in read(folder).values()] == [0, 1]


def test_a_run_killed_before_its_record_is_on_disk_still_has_its_checkpoints(
    train, numbers, read, monkeypatch, tmp_path
):
    folder = train("scale.checkpoint_seconds=0", seeds=[1])
    whole = read(folder)["cola", 1]
    shutil.rmtree(folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records, "write_record", Mock(side_effect=KeyboardInterrupt))
        train("scale.checkpoint_seconds=0", seeds=[1])
    again = read(train("scale.checkpoint_seconds=0", seeds=[1]))["cola", 1]
    assert again["training"]["resumed"] == 1 and numbers(again) == numbers(whole)
    assert not list((tmp_path / "checkpoints").glob("*"))


# By hand


def test_a_run_by_hand_leaves_its_record_under_output_and_is_reused(config, trained):
    found = config("method=full", "data.task=mrpc", "seed=5")
    score = run_by_hand(found)
    (path,) = (Path(found["output"]) / "tiny_bert" / "full").iterdir()
    assert path.name.startswith("mrpc-seed5-") and records.read_json(path)["score"] == score
    assert run_by_hand(found) == score and trained == [("mrpc", 5)]


def test_a_run_by_hand_that_fails_is_an_error_with_its_record(config):
    found = config("method=full", "learning_rate=1e30")
    with pytest.raises(ValueError, match=r"cola-seed1-[0-9a-f]{12}.json: loss is nan at step"):
        run_by_hand(found)
    (path,) = (Path(found["output"]) / "tiny_bert" / "full").iterdir()
    assert records.read_json(path)["status"] == "failed"


# Dialogues: merged models, and the basis stage


@pytest.fixture
def dialogues(cell_of, tmp_path):
    """``dialogues("method=lora", seeds=[1])``: gradients and basis, then a cell on dialogues; gives the cell."""

    def make(*overrides, seeds=(1, 2)):
        folder = tmp_path / "basis" / "tiny"
        if not folder.exists():
            gradients_cell(cell_of(*overrides, chat=True))
            basis_cell(cell_of(*overrides, chat=True))
        cell = cell_of(*overrides, seeds=seeds, chat=True, basis=str(folder))
        train_cell(cell)
        return cell

    return make


def test_a_cell_reads_the_basis_stage_and_reuses_what_is_finished(dialogues, trained, read, tmp_path):
    cell = dialogues("method=sparsegrad")
    found = read(cell.folder("runs"))
    assert list(found) == trained == [("oasst1", 1), ("oasst1", 2)]
    record = found["oasst1", 1]
    assert record["basis"]["gradients"] == {"up": 6, "down": 6} and record["config"]["method"]["name"] == "sparsegrad"
    assert record["data"]["facts"]["train"]["threads"] > 0
    report = records.read_json(tmp_path / "basis" / "tiny" / "hosvd.json")["oasst1"]
    assert set(report) == {"up", "down"} and report["up"]["seconds"] > 0
    dialogues("method=sparsegrad")
    assert len(trained) == 2


@pytest.mark.parametrize("lost", ["config.json", "all", "another run's"])
def test_a_lost_merged_model_is_made_again(lost, dialogues, numbers, read):
    cell = dialogues("method=full", seeds=[1])
    folder, model = cell.folder("runs"), cell.folder("models") / "seed1"
    before, kept = read(folder)["oasst1", 1], load_file(model / "model.safetensors")
    marker = records.read_json(model / "training.json")
    if lost == "all":
        shutil.rmtree(model)
    elif lost == "config.json":
        (model / "config.json").unlink()
    else:
        records.write_json(model / "training.json", marker | {"config_hash": "0123456789ab"})
    dialogues("method=full", seeds=[1])
    assert numbers(read(folder)["oasst1", 1]) == numbers(before)
    assert records.read_json(model / "training.json") == marker
    assert all(torch.equal(kept[key], value) for key, value in load_file(model / "model.safetensors").items())


def test_a_decoder_that_diverges_is_recorded_and_the_cell_fails(dialogues):
    with pytest.raises(ValueError, match="2 of 2 searches and runs failed; .*loss is"):
        dialogues("method=full", "learning_rate=1e30", "protocol.max_grad_norm=null", "scale.warmup_steps=0")


def test_bases_of_other_data_are_refused(dialogues):
    dialogues("method=sparsegrad", seeds=[1])
    with pytest.raises(ValueError, match="was made with data=.*run the gradients and basis stages"):
        dialogues("method=sparsegrad", "chat.threads=best", seeds=[1])


# Searches


@pytest.fixture
def search(cell_of):
    """``search("scale.search.trials=4", tasks=["cola"])``: a search; gives the summary of CoLA's."""

    def make(*overrides, **others):
        cell = cell_of("method=full", *SMALL, *overrides, **others)
        search_cell(cell)
        return records.read_json(cell.folder("search") / "cola.json")

    return make


def test_a_search_leaves_a_journal_and_a_summary(search, tmp_path):
    found = search(tasks=("cola", "mrpc"))
    names = ["cola.journal", "cola.json", "mrpc.journal", "mrpc.json"]
    assert sorted(p.name for p in (tmp_path / "search" / "tiny_bert" / "full").iterdir()) == names
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 3
    assert [trial["learning_rate"] for trial in found["trials"][:2]] == [0.001, 0.01]
    assert list(found["trials"][0]["intermediate"]) == ["2", "4"]
    assert found["run"]["kind"] == "search" and found["run"]["method"] == "full" and found["seed"] == 34
    assert found["best"]["value"] == max(trial["value"] for trial in found["trials"])
    assert found["n_trials"] == 3 and found["provenance"]["python"]


def test_a_search_is_extended_not_repeated_and_a_finished_one_is_left_alone(search, trained, tmp_path):
    first = search()["trials"]
    before = contents(tmp_path / "search")
    search()
    assert len(trained) == 3 and contents(tmp_path / "search") == before
    assert search("scale.search.trials=4")["trials"][:3] == first and len(trained) == 4


def test_a_searched_grid_is_extended_and_then_left_alone(search, trained, monkeypatch):
    scores = iter([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.0, 0.0])
    monkeypatch.setattr(glue, "evaluate", lambda *_: scored(next(scores)))
    points = ["scale.search.points=[0.0001, 0.001]", "scale.search.trials=2", "+scale.search.extend=3"]
    found = search(*points)
    assert [trial["learning_rate"] for trial in found["trials"]] == [1e-4, 1e-3, 1e-2, 1e-1]
    assert (found["n_trials"], found["extended"], found["best"]["learning_rate"]) == (4, 2, 0.01)
    assert search(*points) == found and len(trained) == 4


@pytest.mark.parametrize("override", ["protocol.weight_decay=0.1", "scale.search.max_steps=5", "version=9"])
def test_another_configuration_searches_anew(override, search, trained):
    search()
    found = search(override)
    assert len(trained) == 6 and len(found["trials"]) == 3


def test_the_searchs_seed_is_the_protocols(search, trained):
    search("protocol.search_seed=77")
    assert trained == [("cola", 77)] * 3


def test_diverged_trials_count_and_lose(search):
    points = "scale.search.points=[{learning_rate: 1.0e+30, batch_size: 8}, {learning_rate: 0.001, batch_size: 8}]"
    found = search(points, "protocol.search.learning_rate=[1.0e-06, 1.0e+31]", "scale.search.trials=2")
    assert [trial["state"] for trial in found["trials"]] == ["diverged", "complete"]
    assert found["best"]["learning_rate"] == 0.001
    with pytest.raises(ValueError, match=r"no trial of 1 completed .*: lower search.learning_rate"):
        points = "scale.search.points=[{learning_rate: 1.0e+30, batch_size: 8}]"
        search(points, "protocol.search.learning_rate=[1.0e+29, 1.0e+31]", "scale.search.trials=1", "version=9")


def test_pruned_trials_leave_no_checkpoint(search, tmp_path, monkeypatch):
    scores = iter([0.9, 0.9, 0.1, 0.1, 0.1, 0.1])
    monkeypatch.setattr(glue, "evaluate", lambda *_: scored(next(scores)))
    found = search("scale.search.pruning={startup_trials: 1, warmup_steps: 0}", "scale.checkpoint_seconds=0")
    assert [trial["state"] for trial in found["trials"]] == ["complete", "pruned", "pruned"]
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_killed_trial_goes_on_from_its_checkpoint(search, tmp_path, trained, killed):
    killed(4, lambda: search("scale.checkpoint_seconds=0"))
    assert list((tmp_path / "checkpoints").glob("*/step_*"))
    broken = search("scale.checkpoint_seconds=0")
    assert len(trained) == 4 and not list((tmp_path / "checkpoints").glob("*"))
    shutil.rmtree(tmp_path / "search")
    whole = search("scale.checkpoint_seconds=0")
    for one, other in zip(broken["trials"], whole["trials"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_a_cell_searches_what_is_missing_and_trains_with_what_was_found(search, train, trained, read, tmp_path):
    best = search()["best"]
    folder = train(*SMALL, tasks=["cola", "mrpc"], seeds=[1])
    assert trained == [("cola", 34)] * 3 + [("cola", 1)] + [("mrpc", 34)] * 3 + [("mrpc", 1)]
    assert read(folder)["cola", 1]["hyperparameters"] == {k: best[k] for k in ("learning_rate", "batch_size")}
    one_given = train(*SMALL, "learning_rate=5e-05", seeds=[1])
    assert read(one_given)["cola", 1]["hyperparameters"] == {"learning_rate": 5e-5, "batch_size": best["batch_size"]}
    assert len(trained) == 9


def test_a_protocol_without_a_search_has_none(cell_of):
    with pytest.raises(ValueError, match="protocol=sound searches nothing: its hyper-parameters are given"):
        search_cell(cell_of(chat=True))
    with pytest.raises(ValueError, match="scale=smoke searches nothing: its hyper-parameters are given"):
        search_cell(cell_of("scale.search=null"))


def test_a_search_is_one_process(search, train, trained, monkeypatch):
    search()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    search()  # nothing is missing
    with pytest.raises(ValueError, match="a search is one process: run experiments/search.py by python first"):
        search("version=9")
    assert len(trained) == 3


def _moved(search):
    search["best"]["learning_rate"] *= 2


def _of_other_trials(search):
    search["trials"][0]["value"] = search["best"]["value"] = 0.99
    search["best"] |= {name: search["trials"][0][name] for name in ("learning_rate", "batch_size")} | {"trial": 0}


@pytest.mark.parametrize("edit", [None, _moved, _of_other_trials], ids=["torn", "moved", "resealed"])
def test_a_search_that_is_not_what_its_journal_tells_is_written_anew_and_no_trial_repeated(
    edit, search, trained, tmp_path, caplog
):
    whole = search()
    path = tmp_path / "search" / "tiny_bert" / "full" / "cola.json"
    edited = records.read_record(path)
    if edit is None:
        path.write_text(path.read_text()[:-30])
    elif edit is _moved:
        edit(edited)
        records.write_json(path, edited)
    else:  # its checksum is right again
        edit(edited)
        records.write_record(path, edited)
    again = search()
    assert again["best"] == whole["best"] and again["trials"] == whole["trials"] and len(trained) == 3
    assert "cola.json" in caplog.text
