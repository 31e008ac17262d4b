"""Jobs of SLURM, by submitit: the commands are stand-ins on PATH that run a batch file at once, or hold it."""

import itertools
import os
import time
from functools import partial
from pathlib import Path

import pytest

from finetune.runs import slurm
from finetune.runs.cells import train_cell
from finetune.runs.slurm import SlurmSlot
from finetune.runs.workers import Workers, run_all
from finetune.training.loop import OutOfTime

NUMBERS = itertools.count(100, 100)  # submitit remembers how the jobs of this process ended
COMMANDS = {
    # Each job has a number, and its process' id tells sacct and scancel of it.
    "sbatch": """
        n=$SLURM_FIRST; until mkdir "$SLURM_STAND_IN/$n" 2>/dev/null; do n=$((n + 1)); done
        cp "$1" "$SLURM_STAND_IN/$n/batch"
        if [ -z "$SLURM_HOLDS" ]; then
            SLURM_JOB_ID=$n setsid bash "$1" >/dev/null 2>&1 &
            echo $! > "$SLURM_STAND_IN/$n/pid"
        fi
        echo "Submitted batch job $n" """,
    "srun": """while [ "${1#--}" != "$1" ]; do case $1 in --output|--error) shift;; esac; shift; done; exec "$@" """,
    "sacct": """
        echo "JobID|State|NodeList"
        cd "$SLURM_STAND_IN"; for n in [0-9]*; do pid=$(cat $n/pid 2>/dev/null)
        if [ -z "$pid" ]; then state=PENDING; elif kill -0 $pid 2>/dev/null; then state=RUNNING; else state=FAILED; fi
        echo "$n|$state|here"; done""",
    "scancel": """echo $1 >> "$SLURM_STAND_IN/cancelled" """,
}


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """The folder of the first job."""
    folder, commands = tmp_path / "queue", tmp_path / "bin"
    folder.mkdir()
    commands.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(folder))
    monkeypatch.setenv("SLURM_FIRST", first := str(next(NUMBERS)))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3] / "src"))
    return folder / first


def of(tmp_path, count=5, **others):
    config = {"device": "auto", "threads": None, "checkpoints": str(tmp_path), **others}
    options = {"partition": "gpu", "time": 240, "gpus_per_node": 1}
    return Workers.of(config | {"workers": {"executor": "slurm", "count": count, "slurm": options}})


def test_jobs_are_submitted_and_one_that_dies_is_lost_alone(queue, tmp_path):
    seen = {}
    jobs = [partial(pow, 2, 3), partial(os._exit, 1), partial(pow, 2, 4)]
    with pytest.raises(ValueError, match=r"^b: the worker's process died"):
        run_all(jobs, of(tmp_path), names=["a", "b", "c"], note=lambda *found: seen.update([found]))
    assert seen == {0: 8, 2: 16}
    text = (queue / "batch").read_text()
    for line in ("partition=gpu", "time=240", "gpus-per-node=1", f"output={tmp_path}/slurm/%j_0_log.out"):
        assert f"#SBATCH --{line}\n" in text


def test_an_error_of_a_job_is_raised_as_it_is(queue, tmp_path):
    with pytest.raises(ValueError, match=r"^invalid literal for int\(\) with base 10: 'x'$"):
        run_all([partial(int, "x")], of(tmp_path, count=1))


def test_what_is_still_queued_after_the_time_is_taken_back(queue, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_HOLDS", "1")
    monkeypatch.setattr(slurm, "GRACE", 0.0)
    with pytest.raises(OutOfTime, match=f"job {queue.name} was still queued"):
        SlurmSlot({}, tmp_path, None, time.time()).call(partial(pow, 2, 3))
    assert (queue.parent / "cancelled").read_text() == f"{queue.name}\n"


def test_a_job_whose_time_on_the_node_ends_is_queued_again_as_it_was():
    again = slurm._Job(partial(pow, 2, 3), threads=None).checkpoint()
    assert again.result() == 8


def test_without_slurm_and_with_options_of_no_one(tmp_path, queue, monkeypatch):
    with pytest.raises(ValueError, match=r"Unavailable parameter\(s\): \['partitions'\]"):
        SlurmSlot({"partitions": "gpu"}, tmp_path, None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="executor=slurm, but Could not detect"):
        SlurmSlot({}, tmp_path, None)


@pytest.mark.slow
def test_a_cell_by_slurm_gives_the_numbers_of_this_process(queue, cell_of, read, numbers, tmp_path):
    found = []
    for workers in ({"executor": "slurm", "count": 2}, 1):
        cell = cell_of("method=lora", seeds=[1, 2], workers=workers)
        train_cell(cell)
        found.append({key: numbers(record) for key, record in read(cell.folder("runs")).items()})
        (tmp_path / "runs").rename(tmp_path / f"runs {len(found)}")
    assert found[0] == found[1] and len(found[0]) == 2 and len(list(queue.parent.iterdir())) == 2
