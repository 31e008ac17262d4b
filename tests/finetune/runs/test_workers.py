"""Workers: the same numbers however many there are, one clear error, and nothing lost when a process is killed."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from finetune.runs import workers
from finetune.runs.cells import search_cell, train_cell
from finetune.runs.workers import Workers, run_all
from finetune.store import records

TWO = Workers(2, threads=1)
PAIR = {"tasks": ["cola", "mrpc"], "threads": 1}


@pytest.mark.parametrize(
    ("wanted", "cores", "cuda", "expected"),
    [
        ({"workers": 1}, 8, 0, (1, None, ())),
        ({"workers": 2}, 8, 0, (2, 4, ())),
        ({"workers": 4, "threads": 3}, 2, 0, (4, 3, ())),
        ({"workers": "auto"}, 6, 0, (6, 1, ())),
        ({"workers": "auto"}, 6, 2, (2, 3, ("0", "1"))),
        ({"workers": "auto", "device": "cpu"}, 6, 2, (6, 1, ())),
        ({}, 6, 0, (1, None, ())),
    ],
)
def test_how_many_and_on_what(wanted, cores, cuda, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = Workers.of({"device": "auto", "threads": None} | wanted)
    assert (found.count, found.threads, found.devices) == expected


def test_several_processes_of_one_run_have_one_worker_each(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert Workers.of({"workers": "auto", "device": "cpu", "threads": None}).count == 1
    with pytest.raises(ValueError, match="workers=2, but accelerate launch or torchrun started this run"):
        Workers.of({"workers": 2, "device": "cpu", "threads": None})


def test_workers_share_out_the_devices_in_turn(monkeypatch):
    made, slot = [], workers._Slot
    monkeypatch.setattr(workers, "_Slot", lambda threads, device: made.append(device) or slot(threads, device))
    seen = run_all([partial(os.getenv, "CUDA_VISIBLE_DEVICES")] * 2, Workers(2, threads=1, devices=("4", "7")))
    assert made == ["4", "7"] and set(seen) <= {*made}
    run_all([os.getpid] * 3, Workers(3, threads=1, devices=("4", "7")))
    assert made[2:] == ["4", "7", "4"]


@pytest.mark.parametrize("how", [Workers(), TWO])
def test_results_come_in_the_order_of_the_jobs(how):
    assert run_all([partial(pow, 2, n) for n in range(5)], how) == [1, 2, 4, 8, 16]
    assert run_all([], how) == []


def test_one_worker_stays_in_this_process_and_several_leave_it():
    assert set(run_all([os.getpid] * 3, Workers())) == {os.getpid()}
    assert os.getpid() not in run_all([os.getpid] * 3, TWO)
    assert run_all([torch.get_num_threads] * 2, Workers(2, threads=3)) == [3, 3]


@pytest.mark.parametrize("how", [Workers(), TWO])
def test_an_error_of_a_job_is_raised_as_it_is(how):
    with pytest.raises(ValueError, match=r"^invalid literal for int\(\) with base 10: 'x'$"):
        run_all([partial(int, "1"), partial(int, "x"), partial(int, "2")], how)


def noted(folder, name, dies=False):
    if dies:
        signal.raise_signal(signal.SIGKILL)
    (folder / name).write_text(name)
    return name


@pytest.mark.parametrize("dying", [{"b"}, {"a", "d"}])
def test_a_worker_that_is_killed_loses_its_job_alone(dying, tmp_path):
    names = ["a", "b", "c", "d", "e"]
    jobs = [partial(noted, tmp_path, name, name in dying) for name in names]
    text = f"^{', '.join(sorted(dying))}: the worker's process died .*The others are finished and kept: run again\\."
    with pytest.raises(ValueError, match=text):
        run_all(jobs, TWO, names=names)
    assert {path.name for path in tmp_path.iterdir()} == {*names} - dying
    assert not multiprocessing.active_children()


@pytest.fixture
def interruptible():
    """A shell's background jobs ignore Ctrl-C, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_ends_the_workers_at_once():
    """Ctrl-C that reaches the parent alone; from a terminal it reaches the workers too, which end without a word."""
    threading.Timer(1.0, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        run_all([partial(time.sleep, 3600)] * 4, TWO)
    assert not multiprocessing.active_children()


# Cells


def test_numbers_do_not_depend_on_the_number_of_workers(cell_of, numbers, read, trained, tmp_path):
    """Runs and searches; a second call finds what the workers wrote, and does nothing."""
    small = ("learning_rate=null", "batch_size=null", "scale.search.max_steps=2", "scale.search.trials=2",
             "scale.search.points=[{learning_rate: 0.001, batch_size: 8}]", "method=sparsegrad")  # fmt: skip
    found = {}
    for count in (2, 1):
        cell = cell_of(*small, **PAIR, workers=count)
        train_cell(cell)
        searches = [records.read_json(cell.folder("search") / f"{task}.json") for task in cell.tasks]
        trials = [[trial | {"seconds": 0} for trial in search["trials"]] for search in searches]
        found[count] = ({key: numbers(r) for key, r in read(cell.folder("runs")).items()}, trials)
        if count == 2:
            assert not trained and len(found[2][0]) == 4
            train_cell(cell_of(*small, **PAIR, workers=1))
            assert not trained
            (tmp_path / "runs").rename(tmp_path / "kept")
            (tmp_path / "search").rename(tmp_path / "kept search")
    assert len(trained) == 8 and found[1] == found[2]


def test_failed_runs_of_workers_are_records_and_the_others_are_done(cell_of, read):
    cell = cell_of("learning_rate=1e30", **PAIR, workers=2)
    with pytest.raises(ValueError, match="4 of 4 searches and runs failed; cola-seed1-.* is (nan|not finite)"):
        train_cell(cell)
    assert {record["status"] for record in read(cell.folder("runs")).values()} == {"failed"}


def test_a_bad_configuration_is_one_error_from_a_worker_too(cell_of):
    for call in (train_cell, search_cell):
        with pytest.raises(ValueError, match="this model has 40 positions"):
            call(
                cell_of("protocol.padding=max_length", "protocol.max_length=64", **PAIR, workers=2, learning_rate=None)
            )


SCRIPT = """
import json, sys
from pathlib import Path
from finetune.runs.cells import Cell, make_problem, train_cell

if __name__ == "__main__":
    config = json.loads(Path(sys.argv[1]).read_text())
    train_cell(Cell(make_problem(config), ["cola", "mrpc"], [1, 2, 3], Path(sys.argv[2])))
"""


def children(pid):
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [below for child in found for below in children(child)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
@pytest.mark.parametrize("who", ["parent", pytest.param("worker", marks=pytest.mark.slow)])
def test_what_was_written_before_a_kill_is_found_again(who, cell_of, tmp_path, trained, read, numbers):
    """Kill -9 in the middle: no worker outlives its parent, and a rerun does what is missing, with the same numbers."""
    cell = cell_of("scale.checkpoint_seconds=0", **PAIR, seeds=[1, 2, 3], workers=2)
    (tmp_path / "config.json").write_text(json.dumps(cell.problem.config))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", tmp_path / "config.json", tmp_path]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    folder, until = cell.folder("runs"), time.monotonic() + 240
    while not list(folder.glob("*-seed*.json")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    below = children(process.pid)
    os.kill(process.pid if who == "parent" else below[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    if who == "worker":
        assert process.returncode == 1 and "the worker's process died" in errors
    while any(map(alive, below)) and time.monotonic() < until:
        time.sleep(0.02)
    assert below and not any(map(alive, below))
    written = {path.name for path in folder.glob("*-seed*.json")}
    assert 1 <= len(written) < 6
    again = cell_of("scale.checkpoint_seconds=0", **PAIR, seeds=[1, 2, 3])
    train_cell(again)
    assert len(trained) == 6 - len(written)
    found = read(folder)
    folder.rename(tmp_path / "kept")
    train_cell(again)
    assert {key: numbers(record) for key, record in read(folder).items()} == {k: numbers(r) for k, r in found.items()}
