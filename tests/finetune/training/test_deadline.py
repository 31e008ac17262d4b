"""The time given to a run: it ends with a checkpoint, goes on bit for bit, and begins nothing that it can't do."""

import time
from types import SimpleNamespace

import pytest
import torch

from finetune.training import loop
from finetune.training.loop import OutOfTime


@pytest.fixture
def clock(monkeypatch):
    """``clock(3)``: the time is over after so many steps from here on; the deadline is 0."""

    def make(steps):
        left = iter([-1.0] * (steps + 1))  # once before the first step, once after each
        monkeypatch.setattr(loop, "time", SimpleNamespace(time=lambda: next(left, 1.0), monotonic=time.monotonic))

    return make


@pytest.fixture
def fit(classifier, build, run_training, tmp_path):
    """``fit("full", deadline=...)``: ten steps of dropout and Adam, an evaluation every five; progress and weights."""

    def make(name, **changes):
        torch.manual_seed(0)
        method = build(name)
        model = method.prepare(classifier())
        optimizer = method.optimizer(model, 1e-3, 0.0)
        torch.manual_seed(7)
        changes = {"checkpoint_seconds": 1e9, "digest": "d", "files": tmp_path / name} | changes
        progress = run_training(model, optimizer, **changes)
        return progress, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    return make


@pytest.mark.parametrize(("method_name", "steps"), [("full", 5), ("lora", 9), ("meprop", 3), ("sparsegrad", 1)])
def test_a_run_in_slices_is_the_run_in_one_go(method_name, steps, fit, clock, tmp_path):
    whole, weights = fit(method_name, files=None)
    slices = 0
    for _ in range(12):
        clock(steps - 1)
        try:
            parts, found = fit(method_name, deadline=0.0)
            break
        except OutOfTime:
            slices += 1
            assert len(list((tmp_path / method_name).glob("step_*"))) in (1, 2)
    assert slices == parts.resumed == -(-10 // steps) - 1
    assert parts.evaluations == whole.evaluations and parts.best_step == whole.best_step
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_nothing_begins_when_the_time_is_over(fit, tmp_path):
    with pytest.raises(OutOfTime):
        fit("full", deadline=time.time())
    assert not list(tmp_path.glob("*/step_*"))


def test_the_time_left_must_hold_the_longest_step_so_far(fit, tmp_path, monkeypatch):
    """An evaluation of ten minutes makes a step of ten: none begins within nine."""
    now = iter([0.0, 0.0, 600.0] + [1200.0] * 20)  # begun; the first step ends; it was as long as its evaluation
    monkeypatch.setattr(loop, "time", SimpleNamespace(time=lambda: 1200.0, monotonic=lambda: next(now)))
    with pytest.raises(OutOfTime, match="step 1 of 10"):
        fit("full", deadline=1200.0 + 540.0)
    assert [path.name for path in (tmp_path / "full").glob("step_*")] == ["step_00000001"]
