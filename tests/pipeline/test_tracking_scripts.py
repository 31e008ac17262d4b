"""wandb from the scripts, without an account: what stages send as they run."""

import json

import pytest
import yaml

pytest.importorskip("wandb")


@pytest.fixture
def cell(tmp_path, tiny):
    """Arguments of a SparseGrad cell of one task and one seed."""
    (tmp_path / "work/params.yaml").write_text(yaml.safe_dump({"name": "test", "tasks": ["cola"], "seeds": [1]}))
    return [*tiny, "cell=params.yaml", "name=test", "method=sparsegrad", "batch_size=null"]


def test_stages_send_runs_trials_and_searches_once(script, cell):
    folder = script("gradients", *cell).folder
    assert script("basis", "cell=params.yaml", "name=test", "model=tiny_bert", "device=cpu").code == 0
    tracked = [*cell, "basis=results/test/basis/tiny_bert", "wandb.mode=offline"]
    counts = []
    for stage in ("search", "train", "search"):  # the second search has nothing to do, and sends nothing
        done = script(stage, *tracked)
        assert done.code == 0, done.err
        counts.append(len(list((folder / "outputs/wandb").rglob("offline-run-*/run-*.wandb"))))
    assert counts == [3, 4, 4]  # two trials and their search; one run


def test_the_dashboard_is_written_and_published_only_when_asked(script):
    pytest.importorskip("wandb_workspaces")
    done = script("dashboard", "project=mine")
    assert done.code == 0, done.err
    assert json.loads((done.folder / "outputs/dashboard.json").read_text())["project"] == "mine"
    done = script("dashboard", "dry_run=false")
    assert done.code == 1 and "entity is missing: give the wandb user or team" in done.err
    done = script("dashboard", "dry_run=false", "entity=someone")
    assert done.code == 1 and "WANDB_API_KEY is not set" in done.err and "Traceback" not in done.err
