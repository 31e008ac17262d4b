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

from finetune.runs.cells import Cell, basis_cell, gradients_cell
from finetune.store import records
from finetune.store.experiment import write_params

ROOT = Path(__file__).resolve().parents[3]


def edit(path, **changes):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


@pytest.fixture
def hour(tmp_path, tiny_checkpoint, glue_root, chat_root):
    """``hour("name", seeds=[1], ...)``: a folder with hour_offline cut to a test's size, tiny models under its names."""

    def make(name, **own):
        folder = tmp_path / name
        shutil.copytree(ROOT / "conf", folder / "conf")
        shutil.copytree(ROOT / "experiments", folder / "experiments", ignore=shutil.ignore_patterns("*.py"))
        shutil.copy(ROOT / "dvc.yaml", folder)
        tiny = {"checksums": {}, "revision": None, "architecture": None, "lora_rank": 1}
        edit(folder / "conf/model/mpnet_base.yaml", checkpoint=str(tiny_checkpoint), k=40, **tiny)
        tiny |= {"layers_to_transform": [0, 3], "template": "llama-2", "chat_template": None}
        edit(folder / "conf/model/gemma3_270m.yaml", checkpoint=str(chat_root / "models" / "tiny"), k=40, **tiny)
        edit(folder / "conf/data/glue.yaml", root=str(glue_root))
        edit(folder / "conf/chat/oasst1.yaml", root=str(chat_root), validation_share=0.1)
        cut = {"extends": "hour_offline", "name": "hour", "scale": "hour_cut", "measurements": "smoke"} | own
        (folder / "experiments" / "mine.yaml").write_text(yaml.safe_dump(cut))
        write_params(folder / "experiments" / "mine.yaml", folder / "params.yaml", folder / "conf")
        return folder

    return make


def slices(folder, *arguments, **others):
    """The command, in a process of its own; its bases are made before."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "finetune.runs.slices", "params.yaml", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, **others)


def bases(folder, monkeypatch):
    from finetune.runs.slices import composed_cells

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


def in_slices(folder, killed_after, minutes):
    """Slice after slice until all is done, one of them killed; returns how many there were."""
    for number in range(1, 40):
        process = slices(folder, "--minutes", str(minutes), start_new_session=True)
        if number == killed_after:
            while process.poll() is None and not list((folder / "results").glob("*/runs/*/*/*-seed*.json")):
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            continue
        said = process.communicate()[1]
        assert process.returncode == 0, said
        if "are left" not in said:
            return number
    raise AssertionError("it does not come to its end")


@pytest.mark.slow  # a minute: the whole of it, searches of all methods
@pytest.mark.parametrize("minutes", [0.2])
def test_the_whole_in_slices_killed_once_is_the_whole_in_one_go(minutes, hour, numbers, monkeypatch):
    own = {"tasks": ["cola", "mrpc"], "seeds": [1, 2], "decoder_seeds": [1]}
    one, other = hour("one", **own), hour("other", **own)
    bases(one, monkeypatch)
    for kind in ("basis", "gradients"):
        shutil.copytree(one / "results" / "hour" / kind, other / "results" / "hour" / kind)
    process = slices(one)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert in_slices(other, killed_after=2, minutes=minutes) > 3
    whole, sliced = found(one, numbers), found(other, numbers)
    assert whole == sliced
    methods = {path.parts[4] for path in whole}
    assert {"frozen_mlp", "dora", "shira", "random_entries", "truncated_refreshed"} < methods
    assert len(list((one / "results").glob("*/runs/mpnet_base/*/*-seed*.json"))) == 11 * 4


def test_two_methods_in_slices_killed_once_are_those_of_one_go(hour, numbers, monkeypatch):
    own = {"tasks": ["cola"], "seeds": [1], "methods": ["full", "sparsegrad"], "ablations": [], "decoder_ablations": []}
    own |= {"decoder_seeds": [1]}
    one, other = hour("one", **own), hour("other", **own)
    bases(one, monkeypatch)
    for kind in ("basis", "gradients"):
        shutil.copytree(one / "results" / "hour" / kind, other / "results" / "hour" / kind)
    process = slices(one)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert in_slices(other, killed_after=1, minutes=0.03) > 1
    assert found(one, numbers) == found(other, numbers)
    assert len(found(one, numbers)) == 10
