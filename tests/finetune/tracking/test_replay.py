"""Read back from wandb's own files: a tracked run and a replayed record are the record, in the same run of wandb."""

import json
import sys

import pytest

from finetune.store import records
from finetune.tracking import mirror, replay
from finetune.tracking.offline_run import offline_files, read_offline_run
from finetune.tracking.tracker import CONFIG, METRICS, SUMMARY, TRAIN_LOSS, VALIDATION, chosen, run_id


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """wandb without an account, its caches and settings in tmp_path."""
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.1")
    found = pytest.importorskip("wandb")
    yield found
    found.teardown()  # its service process, which later processes would find through the environment


@pytest.fixture
def settings(tmp_path):
    return {"mode": "offline", "folder": str(tmp_path / "sent"), "project": "tests"}


def validations(history):
    """Rows of a history that hold an evaluation, as a record's ``evaluations`` has them."""
    rows = [{k: v for k, v in row.items() if k == "step" or k.startswith(VALIDATION)} for row in history]
    return [{k.removeprefix(VALIDATION): v for k, v in row.items()} for row in rows if len(row) > 1]


@pytest.fixture
def trained(config, tmp_path):
    """``trained("wandb.mode=offline", seed=1)``: a record of a tiny run that was tracked below tmp_path / "live"."""
    from finetune.runs.glue import Inputs, train_run

    def make(*overrides, seed=1):
        found = config("method=full", *overrides)
        found["wandb"] |= {"folder": str(tmp_path / "live")}
        return train_run(Inputs(found), "cola", seed, {"learning_rate": 1e-3, "batch_size": 8})

    return make


def only_run(folder):
    (paths,) = offline_files(folder).values()
    return replay.read_when_written(paths[-1])


def test_a_tracked_run_reads_back_as_its_record(wandb, trained, tmp_path):
    record = trained("wandb.mode=offline")
    found = only_run(tmp_path / "live")
    as_json = json.loads(json.dumps(record))
    assert found.run["id"] == run_id(record["run"]) and found.run["job_type"] == "train"
    assert found.run["group"] == "hand/tiny_bert/full" and found.run["name"] == "tiny_bert full cola seed 1"
    assert found.config == chosen(as_json, CONFIG) and {"run", "config", "hyperparameters"} <= set(found.config)
    assert validations(found.history) == as_json["evaluations"] and len(found.history) == 2
    assert [row["step"] for row in found.history if TRAIN_LOSS in row] == [6]
    summary = chosen(as_json, SUMMARY)
    assert {name: found.summary.get(name) for name in summary} == summary and summary["score"] is not None
    assert found.exit_code == 0 and found.system and "cpu" in found.system[-1]


def test_a_replayed_record_reads_back_as_the_tracked_run(wandb, trained, settings):
    record = trained()  # not tracked
    assert replay.publish([mirror.of_training(record)], settings) == {"sent": 1, "known": 0, "skipped": 0}
    found = only_run(settings["folder"])
    assert found.run["id"] == run_id(record["run"]) and found.config == chosen(record, CONFIG)
    assert validations(found.history) == record["evaluations"]
    summary = chosen(record, SUMMARY)
    assert {name: found.summary.get(name) for name in summary} == summary
    assert not found.system  # this machine's are not the run's


SEARCH = {
    "run": {"experiment": "e", "kind": "search", "model": "m", "method": "lora", "task": "cola", "config_hash": "c"},
    "best": {"learning_rate": 0.1, "batch_size": 8, "value": 0.5, "trial": 2},
    "best_is_at_edge": True,
    "n_trials": 3,
    "seed": 34,
    "trials": [
        {"number": 0, "value": 0.25, "learning_rate": 0.01, "batch_size": 8, "seconds": 1.0, "state": "complete"},
        {"number": 1, "value": None, "learning_rate": 0.05, "batch_size": 16, "seconds": 2.0, "state": "pruned"},
        {"number": 2, "value": 0.5, "learning_rate": 0.1, "batch_size": 8, "seconds": 3.0, "state": "complete"},
    ],
}


@pytest.fixture
def results(tmp_path):
    """An experiment's results: a search, bases, an answer record, and a run that is not its cell's any more."""
    root = tmp_path / "results" / "e"
    records.write_json(root / "search/m/lora/cola.json", SEARCH)
    records.write_json(root / "basis/m/hosvd.json", {"cola": {"seconds": 1.5, "gradients": {"up": 4}}})
    (root / "basis/m/cola.safetensors").write_bytes(b"bases")
    for number, method in enumerate(("full", "lora")):
        run = {"experiment": "e", "kind": "judgments", "model": "m", "method": method, "seed": 1, "config_hash": "same"}
        record = {"run": run, "judge": {"name": "local"}, "status": "finished", "counts": {"items": number}}
        records.write_json(root / f"mt_bench/judgments/m/{method}/a.json", record)
        records.write_json(root / f"mt_bench/judgments/m/{method}/cell.json", {"records": ["a.json"]})
        records.write_json(root / f"mt_bench/judgments/m/{method}/old.json", record | {"run": run | {"seed": 9}})
    return tmp_path / "results"


def test_stages_are_jobs_with_their_files(wandb, results, settings):
    found = {m.job_type + m.run.get("method", ""): m for m in mirror.collect(results, "e")}
    assert list(found) == ["basis", "searchlora", "judgmentsfull", "judgmentslora"]
    assert len({m.id for m in found.values()}) == 4  # one judge's hash, two methods
    replay.publish(found.values(), settings)
    runs = {id: replay.read_when_written(paths[-1]) for id, paths in offline_files(settings["folder"]).items()}
    search, basis = (runs[found[name].id] for name in ("searchlora", "basis"))
    assert [row["trial/best"] for row in search.history] == [0.25, 0.25, 0.5]
    assert "trial/score" not in search.history[1] and search.summary["best"] == SEARCH["best"]
    (best,) = search.artifacts
    assert (best["name"], best["type"], best["files"]) == ("best-m-lora-cola", "search", ["cola.json"])
    assert best["metadata"] == SEARCH["best"]
    assert basis.artifacts[0]["files"] == ["cola.safetensors"] and basis.summary["cola"]["seconds"] == 1.5
    assert {row_name for row in search.history for row_name in row} - {"step"} <= set(METRICS)


def test_replaying_twice_sends_nothing_twice_and_a_changed_record_again(wandb, results, settings):
    assert replay.publish(mirror.collect(results, "e"), settings)["sent"] == 4
    assert replay.publish(mirror.collect(results, "e"), settings) == {"sent": 0, "known": 4, "skipped": 0}
    assert all(len(paths) == 1 for paths in offline_files(settings["folder"]).values())
    records.write_json(results / "e/search/m/lora/cola.json", SEARCH | {"best_is_at_edge": False})
    assert replay.publish(mirror.collect(results, "e"), settings) == {"sent": 1, "known": 3, "skipped": 0}
    online = settings | {"mode": "online"}  # without a key it is kept offline, and not taken for sent
    assert replay.publish(mirror.collect(results, "e"), online)["sent"] == 4
    assert replay.publish(mirror.collect(results, "e"), online)["known"] == 0


def test_a_file_that_differs_is_noticed(wandb, results, settings):
    sent = next(m for m in mirror.collect(results, "e") if m.job_type == "search")
    replay.send(sent, settings)
    found = only_run(settings["folder"])
    assert replay.differences(sent, found) == []
    found.history[1]["trial/best"] = 0.3
    found.summary["n_trials"] = 4
    found.config["seed"] = 35
    assert [text.split()[0] for text in replay.differences(sent, found)] == ["config", "history", "summary"]


def test_without_wandb_nothing_is_sent_and_nothing_fails(results, settings, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for mode in ("offline", "disabled"):
        counts = replay.publish(mirror.collect(results, "e"), settings | {"mode": mode})
        assert counts == {"sent": 0, "known": 0, "skipped": 4}
    assert not (tmp_path / "sent").exists()


def test_an_unknown_experiment_names_those_there_are(results):
    with pytest.raises(ValueError, match=r"nope does not exist; .*results has e: run the experiment first"):
        list(mirror.collect(results, "nope"))


def test_a_run_that_was_killed_reads_as_far_as_it_is_whole(wandb, results, settings, tmp_path):
    replay.send(next(m for m in mirror.collect(results, "e") if m.job_type == "search"), settings)
    whole = only_run(settings["folder"])
    (paths,) = offline_files(settings["folder"]).values()
    data = paths[0].read_bytes()
    cut = tmp_path / "run-cut.wandb"
    rows = set()
    for length in range(7, len(data), 11):  # every record is longer than that
        cut.write_bytes(data[:length])
        found = read_offline_run(cut)
        assert found.history == whole.history[: len(found.history)] and found.exit_code is None
        rows.add(len(found.history))
    assert rows == {0, 1, 2, 3}
    damaged = bytearray(data)
    damaged[200] ^= 1
    cut.write_bytes(damaged)
    assert read_offline_run(cut).history == []
    cut.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is no file of an offline wandb run"):
        read_offline_run(cut)


def test_records_longer_than_a_block_are_read(wandb, settings):
    """A chunk of the file holds at most 32 KiB; a configuration may be longer."""
    run = {"experiment": "e", "kind": "train", "model": "m", "method": "full", "seed": 1, "config_hash": "long"}
    sent = mirror.of_training({"run": run, "config": {"text": "x" * 100_000}, "score": 0.5})
    assert replay.send(sent, settings) == "offline"
    assert only_run(settings["folder"]).config["config"]["text"] == "x" * 100_000
