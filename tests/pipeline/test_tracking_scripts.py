"""wandb from the scripts, without an account: what stages send as they run."""

import json

import pytest
import yaml

pytest.importorskip("wandb")


@pytest.fixture
def cell(tmp_path, tiny):
    """Arguments of a cell of one task and one seed."""
    (tmp_path / "work/params.yaml").write_text(yaml.safe_dump({"name": "test", "tasks": ["cola"], "seeds": [1]}))
    return [*tiny, "cell=params.yaml", "name=test", "method=full", "batch_size=null"]


def test_stages_send_runs_trials_and_searches_once(script, cell):
    counts = []
    for stage in ("search", "train", "search"):  # the second search has nothing to do, and sends nothing
        done = script(stage, *cell, "wandb.mode=offline")
        assert done.code == 0, done.err
        counts.append(len(list((done.folder / "outputs/wandb").rglob("offline-run-*/run-*.wandb"))))
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
