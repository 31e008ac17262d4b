"""wandb from the scripts, without an account: what stages send as they run, and what the replay sends afterwards."""

import json

import pytest
import yaml

from finetune.tracking.offline_run import offline_files
from finetune.tracking.replay import read_when_written

pytest.importorskip("wandb")


@pytest.fixture
def cell(tmp_path, tiny):
    """Arguments of a SparseGrad cell of one task and one seed."""
    (tmp_path / "work/params.yaml").write_text(yaml.safe_dump({"name": "test", "tasks": ["cola"], "seeds": [1]}))
    return [*tiny, "cell=params.yaml", "name=test", "method=sparsegrad", "batch_size=null"]


def runs_below(folder):
    """Id -> the runs of wandb below a folder, the latest of each."""
    return {name: read_when_written(paths[-1]) for name, paths in offline_files(folder).items()}


def jobs(runs):
    return sorted(run.run["job_type"] for run in runs.values())


def test_stages_send_runs_trials_searches_and_bases_and_the_replay_sends_them_again(script, cell):
    folder = script("gradients", *cell).folder
    assert script("basis", "cell=params.yaml", "name=test", "model=tiny_bert", "device=cpu").code == 0
    tracked = [*cell, "basis=results/test/basis/tiny_bert", "wandb.mode=offline"]
    for stage in ("search", "train", "search"):  # the second search has nothing to do, and sends nothing
        done = script(stage, *tracked)
        assert done.code == 0, done.err
    live = runs_below(folder / "outputs/wandb")
    assert jobs(live) == ["basis", "search", "train", "trial", "trial"]
    assert all(len(paths) == 1 for paths in offline_files(folder / "outputs/wandb").values())
    artifacts = {a["type"]: a["files"] for run in live.values() for a in run.artifacts}
    assert artifacts == {"basis": ["cola.safetensors"], "search": ["cola.json"]}
    groups = {run.run["group"] for run in live.values()}
    assert groups == {"test/tiny_bert", "test/tiny_bert/sparsegrad"}

    done = script("replay", "name=test")
    assert done.code == 0 and "test: 3 runs sent, 0 sent before, 0 skipped" in done.err
    later = runs_below(folder / "outputs/replay")
    assert jobs(later) == ["basis", "search", "train"] and set(later) <= set(live)
    for name, run in later.items():
        ours, theirs = ({k: v for k, v in r.config.items() if k != "provenance"} for r in (run, live[name]))
        assert ours == theirs and run.run == live[name].run
        assert run.artifacts == live[name].artifacts
        if run.run["job_type"] != "train":
            assert run.history == live[name].history
    assert "test: 0 runs sent, 3 sent before" in script("replay", "name=test", "progress=false").err


def test_disabled_sends_nothing(script, cell):
    folder = script("gradients", *cell).folder
    assert script("basis", "cell=params.yaml", "name=test", "model=tiny_bert", "device=cpu").code == 0
    assert script("search", *cell, "basis=results/test/basis/tiny_bert").code == 0
    assert not (folder / "outputs/wandb").exists()


def test_replay_of_an_experiment_without_records(script):
    done = script("replay", "name=nope")
    assert done.code == 1 and "results/nope does not exist" in done.err and "Traceback" not in done.err


def test_the_dashboard_is_written_and_published_only_when_asked(script):
    pytest.importorskip("wandb_workspaces")
    done = script("dashboard", "project=mine")
    assert done.code == 0, done.err
    assert json.loads((done.folder / "outputs/dashboard.json").read_text())["project"] == "mine"
    done = script("dashboard", "dry_run=false")
    assert done.code == 1 and "entity is missing: give the wandb user or team" in done.err
    done = script("dashboard", "dry_run=false", "entity=someone")
    assert done.code == 1 and "WANDB_API_KEY is not set" in done.err and "Traceback" not in done.err
