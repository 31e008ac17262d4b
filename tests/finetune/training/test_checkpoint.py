"""A killed run goes on as if nothing had happened, bit for bit; a broken checkpoint is never used."""

import json

import pytest
import torch

from finetune.training import checkpoint
from finetune.training.checkpoint import load_checkpoint, remove_checkpoints, restore, save_checkpoint, snapshot

STEPS = 12


class Notes:
    """A tracker that keeps what is logged."""

    def __init__(self):
        self.losses = {}

    def log(self, values, step):
        if "train/loss" in values:
            self.losses[step] = values["train/loss"]

    def validation(self, result, step):
        """Kept by the run's progress."""


@pytest.fixture
def start(classifier, build, spy, run_training, tmp_path):
    """``start("lora", calls=5)``: a run with dropout, from nothing or from its checkpoints; dies after so many."""

    def make(name, calls=None, notes=None, overrides=(), files="run", accumulation_steps=1, **changes):
        one_backward = accumulation_steps == 1
        method = build(name, *overrides, one_backward=one_backward)
        model = method.prepare(classifier(dropout=True))
        optimizer = method.optimizer(model, 2e-3, 0.01)
        torch.manual_seed(changes.pop("torch_seed", 7))
        options = {"max_steps": STEPS, "evaluation_steps": 4, "log_steps": 1, "learning_rate": 2e-3} | changes
        progress = run_training(
            model,
            optimizer,
            split=spy(calls=calls),
            tracker=notes or Notes(),
            files=tmp_path / files,
            accumulation_steps=accumulation_steps,
            weight_decay=0.01,
            **options,
        )
        return model, optimizer, progress

    return make


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def assert_same_run(one, other):
    (model, optimizer, progress), (model2, optimizer2, progress2) = one, other
    assert_equal(dict(model.state_dict()), dict(model2.state_dict()))
    assert_equal(optimizer.state_dict(), optimizer2.state_dict())
    for name in ("step", "score", "best_step", "stale", "stopped", "evaluations"):
        assert getattr(progress, name) == getattr(progress2, name)


# Exact resume. Five batches an epoch: call 8 ends the run in the middle of the second one.


@pytest.mark.parametrize(
    ("name", "override"),
    [("full", None), ("lora", None), ("meprop", None), ("meprop", "protocol.meprop_optimizer=adamw"),
     *((name, None) for name in ("shira", "miss", "lora_fa", "random_entries", "random_entries_redrawn")),
     *(("sparsegrad", f"method.form={form}") for form in ("folded", "rotated", "truncated"))],
)  # fmt: skip
def test_run_killed_in_an_epoch_goes_on_bit_for_bit(name, override, start, spy):
    whole, notes, overrides = Notes(), Notes(), (override,) if override else ()
    expected = start(name, notes=whole, overrides=overrides, files="whole")
    with pytest.raises(spy.Killed):
        start(name, calls=7, notes=notes, overrides=overrides)
    found = start(name, notes=notes, overrides=overrides, torch_seed=123)
    assert_same_run(found, expected)
    assert notes.losses == whole.losses and list(notes.losses) == list(range(1, STEPS + 1))
    assert (found[2].resumed, expected[2].resumed) == (1, 0)


def test_run_killed_between_micro_batches_goes_on_bit_for_bit(method_name, start, spy):
    expected = start(method_name, accumulation_steps=2, files="whole")
    with pytest.raises(spy.Killed):  # call 16 would be the second micro-batch of step 8
        start(method_name, calls=15, accumulation_steps=2)
    assert_same_run(start(method_name, accumulation_steps=2, torch_seed=123), expected)


def test_run_killed_again_and_again_goes_on_bit_for_bit(start, spy):
    expected = start("sparsegrad", files="whole", schedule="linear", warmup_steps=3)
    for attempt, calls in enumerate((1, 3, 2, 0, 4)):
        with pytest.raises(spy.Killed):
            start("sparsegrad", calls=calls, schedule="linear", warmup_steps=3, torch_seed=7 + attempt)
    found = start("sparsegrad", schedule="linear", warmup_steps=3)
    assert_same_run(found, expected)
    assert found[2].resumed == 4  # the attempt that died before its first step left nothing


def test_steps_after_the_last_checkpoint_are_done_again(start, tmp_path, spy):
    notes, whole = Notes(), Notes()
    expected = start("lora", notes=whole, files="whole")
    with pytest.raises(spy.Killed):
        start("lora", calls=7, notes=notes)
    newest = max((tmp_path / "run").glob("step_*"))
    (newest / "model.safetensors").unlink()
    found = start("lora", notes=notes)
    assert_same_run(found, expected)
    assert notes.losses == whole.losses


def test_patience_is_counted_over_the_kill(start, spy):
    options = {"patience": 2, "evaluation_steps": 2, "learning_rate": 1e-9}
    expected = start("full", files="whole", **options)
    assert expected[2].stopped == "no improvement in 2 evaluations"
    with pytest.raises(spy.Killed):
        start("full", calls=5, **options)
    assert_same_run(start("full", **options), expected)


def test_finished_run_is_not_trained_again(start):
    expected = start("full")
    assert_same_run(start("full", calls=0), expected)


def test_best_weights_outlive_the_kill(classifier, run_training, spy, tmp_path):
    best = []

    def run(values, **options):
        model = classifier()

        def note(step, score):
            if step == 2:
                best.append(snapshot(model))

        progress = run_training(
            model,
            torch.optim.AdamW(model.parameters()),
            evaluation=lambda _: {"loss": 0.5, "matthews_correlation": values.pop(0)},
            on_evaluation=note,
            **{"files": tmp_path, "evaluation_steps": 1, "learning_rate": 1e-2, "max_steps": 10} | options,
        )
        return model, progress

    with pytest.raises(spy.Killed):
        run([0.1, 0.9, 0.2, 0.3], split=spy(calls=4))
    model, progress = run([0.4] * 6)
    assert (progress.score, progress.best_step, len(best)) == (0.9, 2, 1)
    assert_equal(snapshot(model), best[0])


# What is on disk


@pytest.fixture
def trained(classifier):
    """A model and an optimizer with state."""
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.fixture
def save(trained, tmp_path):
    """``save(step)``: a checkpoint under ``tmp_path / "run"``, with the step in its progress."""
    model, optimizer = trained

    def make(step, digest="abc", best=None):
        save_checkpoint(tmp_path / "run", step, digest, model, optimizer, {"step": step}, best)
        return tmp_path / "run" / f"step_{step:08d}"

    return make


@pytest.fixture
def read(classifier, tmp_path):
    """``read()``: the step of the checkpoint that loading takes, or None."""

    def make(digest="abc"):
        model = classifier()
        progress, _, _ = load_checkpoint(tmp_path / "run", digest, model, torch.optim.AdamW(model.parameters()))
        return None if progress is None else progress["step"]

    return make


def test_everything_comes_back(trained, save, classifier, tmp_path):
    model, optimizer = trained
    best = {name: tensor + 1 for name, tensor in snapshot(model).items()}
    save(3, best=best)
    expected = torch.rand(3)
    torch.manual_seed(99)
    other = classifier(seed=5)
    other_optimizer = torch.optim.AdamW(other.parameters())
    torch.manual_seed(0)
    _ = [torch.randn_like(p) for p in model.parameters()]  # to the generator's state when it was saved
    at_save = torch.rand(3)
    assert torch.equal(at_save, expected)
    progress, found, damaged = load_checkpoint(tmp_path / "run", "abc", other, other_optimizer)
    assert damaged == 0
    assert torch.equal(torch.rand(3), expected)
    assert progress == {"step": 3}
    assert_equal(found, best)
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))
    assert_equal(other_optimizer.state_dict(), optimizer.state_dict())


def test_newest_is_taken_and_two_are_kept(save, read, tmp_path):
    assert read() is None
    for step in (1, 2, 10, 9_999_999, 10_000_000, 10_000_000):
        save(step)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step_09999999", "step_10000000"]
    assert read() == 10_000_000
    remove_checkpoints(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    remove_checkpoints(tmp_path / "run")  # forgives that there are none


def test_only_safetensors_and_json_are_written(start, tmp_path):
    start("sparsegrad")
    suffixes = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}
    for path in (tmp_path / "run").rglob("*.json"):
        assert isinstance(json.loads(path.read_text()), dict)


def test_nothing_is_unpickled(save, read, monkeypatch):
    import pickle

    save(1)

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert read() == 1


@pytest.mark.parametrize("name", ["model", "optimizer", "random", "best", "state"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_damaged_file_falls_back_to_the_checkpoint_before(name, damage, trained, save, read, tmp_path, caplog):
    best = snapshot(trained[0])
    save(1, best=best)
    path = save(2, best=best) / f"{name}.{'json' if name == 'state' else 'safetensors'}"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    assert read() == 1
    assert "step_00000002 is damaged; the run goes on from the checkpoint before it" in caplog.text
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_00000001"]


def test_a_run_says_how_many_of_its_checkpoints_were_damaged(start, spy, tmp_path):
    expected = start("full", files="whole")
    with pytest.raises(spy.Killed):
        start("full", calls=7)
    for path in (tmp_path / "run").glob("step_*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    found = start("full")
    assert_same_run(found, expected)
    assert (found[2].damaged_checkpoints, found[2].resumed, expected[2].damaged_checkpoints) == (2, 0, 0)


def test_a_state_of_more_devices_than_there_are_is_taken_as_far_as_it_goes(monkeypatch):
    states = {"cpu": torch.get_rng_state(), "cuda0": torch.zeros(16, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    drawn = torch.rand(3)
    checkpoint._set_random_states(states)
    assert torch.equal(torch.rand(3), drawn)


def test_any_flipped_bit_of_the_manifest_falls_back_or_changes_nothing(save, read):
    save(1)
    manifest = save(2) / "manifest.json"
    content = manifest.read_bytes()
    for place in range(0, len(content), 5):
        for bit in (0x01, 0x04, 0x80):
            damaged = bytearray(content)
            damaged[place] ^= bit
            manifest.write_bytes(damaged)
            assert checkpoint._is_whole(manifest.parent) in (True, False)
    manifest.write_bytes(content[: len(content) // 2])
    assert read() == 1


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"model.safetensors": 1}', "{"])
def test_manifest_of_another_shape_falls_back(content, save, read):
    save(1)
    (save(2) / "manifest.json").write_text(content)
    assert read() == 1


@pytest.mark.parametrize("where", ["save_file", "rename", "fsync"])
def test_failure_while_writing_leaves_the_checkpoint_before(where, save, read, monkeypatch, tmp_path):
    save(1)

    def fail(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        place = {"save_file": checkpoint, "rename": checkpoint.Path, "fsync": checkpoint.os}[where]
        patch.setattr(place, where, fail)
        with pytest.raises(OSError, match=r"no space left on device \(the checkpoint before it is kept\): .*02"):
            save(2)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_00000001"]
    assert read() == 1
    save(2)
    assert read() == 2
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step_00000001", "step_00000002"]


def test_half_written_and_broken_checkpoints_are_never_read(save, read, tmp_path):
    (save(1) / "state.json").unlink()
    save(2).rename(tmp_path / "run" / ".step_00000002")
    assert read() is None


def test_checkpoint_of_another_configuration_is_refused(save, read, tmp_path):
    save(1)
    text = r"step_00000001 is a checkpoint of configuration abc, this run is xyz: delete .*run to start anew"
    with pytest.raises(ValueError, match=text):
        read("xyz")


def test_checkpoint_of_another_model_is_refused(save, tmp_path):
    save(1)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="step_00000001 holds .* which this model has not, or in another shape"):
        load_checkpoint(tmp_path / "run", "abc", model, torch.optim.AdamW(model.parameters()))


def test_interval_is_kept(start, tmp_path):
    start("full", checkpoint_seconds=3600.0)
    assert not (tmp_path / "run").exists()


# Snapshots of weights


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(3, 3, bias=False)
        self.b = torch.nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


def test_shared_tensors_are_kept_once_and_stay_shared():
    model = Tied()
    saved = snapshot(model)
    assert list(saved) == ["a.weight"]
    expected = model.a.weight.detach().clone()
    with torch.no_grad():
        model.a.weight.zero_()
    restore(model, saved)
    assert not torch.equal(saved["a.weight"], torch.zeros(3, 3))  # a copy
    assert torch.equal(model.b.weight, expected) and model.b.weight is model.a.weight
