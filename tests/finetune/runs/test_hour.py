"""The experiment of an hour from its own file, sizes cut: in slices, killed once, it leaves the records of one go."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from finetune.runs.cells import Cell
from finetune.runs.preliminary import basis_cell, gradients_cell
from finetune.runs.slices import composed_cells, run_slice
from finetune.store import records
from finetune.store.experiment import write_params

ROOT = Path(__file__).resolve().parents[3]


def edit(path, **changes):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


@pytest.fixture
def hour(tmp_path, tiny_checkpoint, glue_root, chat_root):
    """``hour("name", seeds=[1], ...)``: hour_offline cut to a test's size, with tiny models under its names."""

    def make(name, **own):
        folder = tmp_path / name
        shutil.copytree(ROOT / "conf", folder / "conf")
        shutil.copytree(ROOT / "experiments", folder / "experiments", ignore=shutil.ignore_patterns("*.py"))
        shutil.copy(ROOT / "dvc.yaml", folder)
        tiny = {"checksums": {}, "revision": None, "architecture": None, "lora_rank": 1}
        edit(folder / "conf/model/mpnet_base.yaml", checkpoint=str(tiny_checkpoint), k=40, **tiny)
        tiny |= {"layers_to_transform": [0, 3], "template": "llama-2", "chat_template": None}
        edit(folder / "conf/model/gemma3_270m.yaml", checkpoint=str(chat_root / "models" / "tiny"), k=60, **tiny)
        edit(folder / "conf/protocol/sound_mlp.yaml", density=0.05)  # a core of all outputs has an entry a row at least
        edit(folder / "conf/data/glue.yaml", root=str(glue_root))
        edit(folder / "conf/chat/oasst1.yaml", root=str(chat_root), validation_share=0.1)
        cut = {"extends": "hour_offline", "name": "hour", "scale": "hour_cut", "measurements": "smoke"} | own
        (folder / "experiments" / "mine.yaml").write_text(yaml.safe_dump(cut))
        write_params(folder / "experiments" / "mine.yaml", folder / "params.yaml", folder / "conf")
        return folder

    return make


def slices(folder, *arguments):
    """The command, in a process group of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "finetune.runs.slices", "params.yaml", *arguments]
    said = (folder / "said.txt").open("w")
    with said:
        return subprocess.Popen(command, cwd=folder, env=environment, stderr=said, start_new_session=True)


def bases(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for config in composed_cells("params.yaml", folder):
        cell = Cell.of(config)
        if config["method"]["name"] == "sparsegrad":
            gradients_cell(cell)
            basis_cell(cell)


def found(folder, numbers):
    """All that the cells hold, by path; of searches what they found."""
    results = {}
    for path in sorted((folder / "results").glob("*/runs/*/*/*.json")):
        record = records.read_json(path)
        results[path.relative_to(folder)] = record if path.name == "cell.json" else numbers(record)
    for path in sorted((folder / "results").glob("*/search/*/*/*.json")):
        record = records.read_record(path)
        trials = [trial | {"seconds": 0} for trial in record["trials"]]
        results[path.relative_to(folder)] = record["run"], record["best"], record["extended"], trials
    return results


def in_slices(folder, minutes):
    """Slice after slice until all is done, the second one killed; returns how many there were."""
    for number in range(1, 40):
        process = slices(folder, "--minutes", str(minutes))
        if number == 2:
            there = len(list((folder / "results").rglob("*-seed*.json")))
            while process.poll() is None and len(list((folder / "results").rglob("*-seed*.json"))) == there:
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            continue
        assert process.wait() == 0, (folder / "said.txt").read_text()
        if "are left" not in (folder / "said.txt").read_text():
            return number
    raise AssertionError("it does not come to its end")


def copied(hour, monkeypatch, **own):
    """Two folders of the same experiment with the same bases."""
    one, other = hour("one", **own), hour("other", **own)
    bases(one, monkeypatch)
    for kind in ("basis", "gradients"):
        shutil.copytree(one / "results" / "hour" / kind, other / "results" / "hour" / kind)
    return one, other


@pytest.mark.slow  # minutes: searches and runs of all methods, by the command itself
def test_the_whole_in_slices_killed_once_is_the_whole_in_one_go(hour, numbers, monkeypatch):
    one, other = copied(hour, monkeypatch, tasks=["cola", "mrpc"], seeds=[1, 2], decoder_seeds=[1])
    process = slices(one)
    assert process.wait() == 0, (one / "said.txt").read_text()
    assert in_slices(other, minutes=0.3) > 2
    whole = found(one, numbers)
    assert whole == found(other, numbers)
    methods = {path.parts[4] for path in whole}
    assert {"frozen_mlp", "dora", "shira", "random_entries", "truncated_refreshed"} < methods
    assert len(list((one / "results").glob("*/runs/mpnet_base/*/*-seed*.json"))) == 12 * 4


def test_two_methods_in_slices_killed_once_are_those_of_one_go(hour, numbers, killed, clock, monkeypatch):
    own = {"methods": ["full", "sparsegrad"], "ablations": [], "decoder_ablations": []}
    one, other = copied(hour, monkeypatch, tasks=["cola"], seeds=[1], decoder_seeds=[1], **own)

    def cells(folder):
        monkeypatch.chdir(folder)
        given = {"workers": 1, "device": "cpu", "progress": False}
        loads = {}
        return [Cell.of(config | given, loads) for config in composed_cells("params.yaml", folder)]

    run_slice(cells(one))
    killed(5, lambda: run_slice(cells(other)))
    slices, over = 0, True
    while over:
        clock(14)  # steps
        over, slices = run_slice(cells(other), 0.0).over, slices + 1
    whole = found(one, numbers)
    assert slices > 1
    assert len(whole) == 2 * 2 + 2 * 2 + 2 and whole == found(other, numbers)
