"""examples/trainer.py: a run that is killed goes on by itself, and ends with the bits of one that was not."""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsegrad import load_adapter

SCRIPT = Path(__file__).parents[3] / "examples" / "trainer.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """``run(*arguments)``: what the script prints, in this process."""

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    gc.freeze()  # see the fixture ``trainer``
    yield start
    gc.unfreeze()


def assert_same_folder(one, other):
    for name in ("merged/model.safetensors", "adapter.safetensors", "bases.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name


def test_it_goes_on_from_its_last_checkpoint(run, tmp_path):
    """One line is printed. The adapter holds what the merged model has."""
    from transformers import AutoModelForSequenceClassification

    one, other = tmp_path / "one", tmp_path / "other"
    assert run("--output", one, "--steps", 6, "--save-steps", 3).count("\n") == 1
    other.mkdir()
    (one / "checkpoint-3").rename(other / "checkpoint-3")
    assert run("--output", other, "--steps", 6, "--save-steps", 3).startswith("accuracy 0.")
    assert_same_folder(one, other)
    run("--output", other, "--steps", 6, "--save-steps", 3)  # its last checkpoint is the last step: no step more
    assert_same_folder(one, other)
    merged = AutoModelForSequenceClassification.from_pretrained(one / "merged").eval()
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(merged.config).eval()
    base.load_state_dict(
        runpy.run_path(str(SCRIPT))["model_and_rows"](type("Given", (), {"model": None}))[0].state_dict()
    )
    tokens = torch.arange(1, 16)[None]
    torch.testing.assert_close(load_adapter(one / "adapter.safetensors", base)(tokens).logits, merged(tokens).logits)


@pytest.mark.parametrize("form", ["rotated", "truncated"])
@pytest.mark.slow
def test_a_folder_of_a_model_and_one_of_rows(form, run, tiny_checkpoint, tmp_path):
    rows = [{"text": f"{word} cat sees the dog", "label": label} for label, word in enumerate(("the", "a"))] * 8
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--model", tiny_checkpoint, "--data", tmp_path, "--form", form, "--steps", 60, "--learning-rate", 3e-3]
    assert run("--output", tmp_path / "out", *given).startswith("accuracy 1.000")
    assert (tmp_path / "out" / "merged" / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folded", "rotated", "truncated"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(form, tmp_path):
    """SIGKILL after a checkpoint, twice."""
    command = [sys.executable, str(SCRIPT), "--form", form, "--steps", "120", "--save-steps", "20", "--output"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, timeout=250)
    for number in (1, 2):
        process = subprocess.Popen([*command, str(killed)])
        while _last(killed) < 20 * number:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (killed / "merged").exists()
    subprocess.run([*command, str(killed)], check=True, timeout=250)
    assert_same_folder(whole, killed)


def _last(folder):
    return max(
        (int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoint-*/trainer_state.json")), default=0
    )
