"""Tracking: off is off, offline is files only, and no run stays open."""

import sys

import pytest

from finetune.tracking.results import send_search
from finetune.tracking.tracker import SUMMARY, Tracker, chosen, run_id

NAMES = {"project": "tests", "run_id": "abc123", "group": "hand/tiny/cola", "job_type": "train", "name": "a run"}


@pytest.fixture
def track(tmp_path):
    """``track("offline")``: a tracker that keeps its files in tmp_path / "wandb-files"."""
    return lambda mode, **changes: Tracker(mode, tmp_path / "files", **NAMES | {"config": {"lr": 1e-3}} | changes)


@pytest.fixture
def quiet_wandb(monkeypatch, tmp_path):
    """wandb without an account, its caches and settings in tmp_path."""
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb = pytest.importorskip("wandb")
    yield wandb
    wandb.teardown()  # its service process, which later processes would find through the environment


def test_disabled_does_nothing(track, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # it need not be there
    with track("disabled") as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.summary({"score": 0.5})
        assert (tracker.active, tracker.mode) == (False, "disabled")
    assert list(tmp_path.iterdir()) == [] and not caplog.records


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_missing_wandb_is_said_and_nothing_fails(mode, track, monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with track(mode) as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.validation({"loss": 1.0}, 1)
        tracker.summary({"score": 0.5})
        assert not tracker.active
    assert "pip install wandb, or set wandb.mode=disabled" in caplog.text
    assert list(tmp_path.iterdir()) == []


class FakeRun:
    def __init__(self):
        self.logged, self.summary, self.exit_code = [], {}, None

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self, exit_code):
        self.exit_code = exit_code


class FakeWandb:
    """What a tracker calls, without a process of its own."""

    def __init__(self):
        self.runs, self.arguments, self.key, self.fails = [], [], True, ()

    def login(self, prompt, verify):
        assert (prompt, verify) == (False, False)
        return self.key

    def init(self, **arguments):
        if arguments["mode"] in self.fails:
            raise ConnectionError("no route\nto host")
        self.arguments.append(arguments)
        self.runs.append(FakeRun())
        return self.runs[-1]

    class Settings:
        def __init__(self, **values):
            self.values = values


@pytest.fixture
def fake(monkeypatch):
    found = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


def test_steps_and_names_are_handed_on(fake, track, tmp_path):
    with track("offline") as tracker:
        tracker.log({"loss": 1.0}, 10)
        tracker.log({"loss": 0.5}, 20)
        tracker.summary({"score": 0.7})
    (run,), (arguments,) = fake.runs, fake.arguments
    assert run.logged == [(10, {"loss": 1.0}), (20, {"loss": 0.5})] and run.summary == {"score": 0.7}
    assert run.exit_code == 0
    assert arguments["mode"] == "offline" and arguments["dir"] == str(tmp_path / "files")
    assert (arguments["id"], arguments["project"], arguments["group"]) == ("abc123", "tests", "hand/tiny/cola")
    assert arguments["config"] == {"lr": 1e-3}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_run_is_closed_after_an_exception_and_marked(error, fake, track):
    with pytest.raises(error), track("offline"):
        raise error
    assert fake.runs[0].exit_code == 1
    assert 0 < fake.arguments[0]["settings"].values["finish_timeout"] < 600  # of an upload, not forever


def test_online_without_a_key_is_kept_offline(fake, track, caplog):
    fake.key = False
    with track("online") as tracker:
        assert tracker.active
    assert [arguments["mode"] for arguments in fake.arguments] == ["offline"]
    assert "there is no WANDB_API_KEY: the run is kept offline" in caplog.text


def test_online_without_a_network_is_kept_offline(fake, track, caplog):
    fake.fails = ("online",)
    with track("online") as tracker:
        tracker.log({"loss": 1.0}, 1)
    assert [arguments["mode"] for arguments in fake.arguments] == ["offline"]
    assert fake.runs[0].logged == [(1, {"loss": 1.0})]
    assert "wandb can't start a run online (no route to host)" in caplog.text
    fake.fails = ("online", "offline")
    with track("online") as tracker:
        tracker.log({"loss": 1.0}, 1)
        assert not tracker.active
    assert len(fake.runs) == 1


@pytest.mark.parametrize("what", ["log", "finish"])
def test_a_failure_of_wandb_ends_tracking_and_nothing_else(what, fake, track, monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError("the service is gone")

    monkeypatch.setattr(FakeRun, what, fail)
    with track("offline") as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.log({"loss": 0.5}, 2)
    assert caplog.text.count("the service is gone") == 1 and f"wandb failed ({what}:" in caplog.text


@pytest.fixture
def train(config, tmp_path):
    """``train(learning_rate)``: the record of a run whose tracking is on."""
    from finetune.runs.glue import GlueProblem
    from finetune.runs.problem import Run
    from finetune.runs.run import run_once

    found = config("method=full", "wandb.mode=offline")
    found["wandb"]["folder"] = str(tmp_path / "files")
    return lambda rate: run_once(GlueProblem(found), Run("cola", 1, {"learning_rate": rate, "batch_size": 8}))


def test_failed_training_closes_its_run(fake, train):
    record = train(1e30)
    (run,) = fake.runs
    assert record["status"] == run.summary["status"] == "failed" and run.exit_code is not None
    assert run.summary["error"] == record["error"]


def test_training_logs_losses_and_validation_by_step(fake, train):
    record = train(1e-3)
    (run,) = fake.runs
    validation = {step: values for step, values in run.logged if "validation/loss" in values}
    assert list(validation) == [3, 6]
    for evaluation in record["evaluations"]:
        assert validation[evaluation["step"]]["validation/loss"] == evaluation["loss"]
    assert [step for step, values in run.logged if "train/loss" in values] == [6]
    assert run.summary == chosen(record, SUMMARY) and run.exit_code == 0
    assert run.summary["score"] == record["score"] and run.summary["training"]["steps"] == 6
    arguments = fake.arguments[0]
    assert arguments["id"] == run_id(record["run"])
    assert (arguments["group"], arguments["job_type"]) == ("hand/tiny_bert/full", "train")
    assert arguments["config"]["config"] == record["config"]


def test_a_search_is_a_run_of_its_trials(fake, tmp_path):
    run = {"experiment": "e", "kind": "search", "model": "m", "method": "lora", "task": "cola", "config_hash": "c"}
    points = [(0, 0.25, 0.01), (1, None, 0.05), (2, 0.5, 0.1), (3, 0.1, 0.2)]  # the second was pruned
    trials = [
        {"number": number, "value": value, "learning_rate": rate, "batch_size": 8, "seconds": 1.0}
        for number, value, rate in points
    ]
    content = {"run": run, "trials": trials, "best": {"trial": 2}, "n_trials": 4, "seed": 34, "state": "left out"}
    send_search(content, {"mode": "offline", "folder": str(tmp_path), "project": "p"})
    (sent,), (arguments,) = fake.runs, fake.arguments
    assert [(step, values.get("trial/score"), values["trial/best"]) for step, values in sent.logged] == [
        (0, 0.25, 0.25), (1, None, 0.25), (2, 0.5, 0.5), (3, 0.1, 0.5),
    ]  # fmt: skip
    assert sent.summary == {"best": {"trial": 2}, "n_trials": 4} and sent.exit_code == 0
    assert arguments["job_type"] == "search" and arguments["id"] == run_id(run)
    assert arguments["config"] == {"run": run, "seed": 34} and arguments["name"] == "m lora cola"


def test_offline_writes_files_below_the_folder_and_nowhere_else(quiet_wandb, track, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        with pytest.raises(KeyError), track("offline", run_id=name) as tracker:
            tracker.log({"loss": 1.0}, 1)
            tracker.summary({"score": 0.5})
            raise KeyError  # the second run must start clean
        assert quiet_wandb.run is None
    found = {path.name.rpartition("-")[2] for path in (tmp_path / "files").rglob("*.wandb")}
    assert found == {"first.wandb", "second.wandb"}
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("WANDB_")} == {"files"}
