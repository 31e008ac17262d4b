"""Running the scripts as a user does, each in a process of its own, without importing torch anew for each."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

# Imports once, then forks a process a command: it gets its folder, its arguments, its own standard output and error.
FORKS = """
import json, os, runpy, sys, traceback
import accelerate, fastchat.llm_judge.common, hydra, matplotlib.pyplot, peft, scipy.stats, sklearn.metrics, transformers
import finetune.runs.cells, finetune.runs.search

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chdir(job["folder"])
            for stream, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.argv = job["arguments"]
            sys.path[0] = os.path.dirname(job["arguments"][0])
            runpy.run_path(job["arguments"][0], run_name="__main__")
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
            if isinstance(exit.code, str):
                sys.stderr.write(exit.code + "\\n")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def forks():
    """The process that forks."""
    # WANDB_SERVICE too: a run in this process leaves its service's address there, and runs of others would go to it.
    outside = ("SPARSEGRAD_DATA", "WANDB_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    with process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="session")
def run_in(forks, tmp_path_factory):
    """``run_in(folder, path, "seed=1", ...)``: run a script in a folder; gives ``code``, ``out`` and ``err``."""
    streams = {stream: str(tmp_path_factory.mktemp("streams") / stream) for stream in ("stdout", "stderr")}

    def run(folder, path, *arguments):
        job = {"folder": str(folder), "arguments": [str(path), *arguments]} | streams
        print(json.dumps(job), file=forks.stdin, flush=True)
        code = int(forks.stdout.readline())
        out, err = (Path(stream).read_text() for stream in streams.values())
        return SimpleNamespace(code=code, out=out, err=err, folder=Path(folder))

    return run


@pytest.fixture
def script(run_in, tmp_path):
    """``script("train", "seed=1", ...)``: run experiments/train.py in tmp_path / "work", outside the repository."""
    folder = tmp_path / "work"
    folder.mkdir()

    def run(name, *arguments):
        return run_in(folder, ROOT / "experiments" / f"{name}.py", *arguments)

    return run


@pytest.fixture
def tiny(tiny_checkpoint, glue_root):
    """Overrides that make a run tiny: six steps on the tiny checkpoint."""
    return [
        "model=tiny_bert",
        f"model.checkpoint={tiny_checkpoint}",
        f"data.root={glue_root}",
        "protocol.preliminary.steps=2",
        "protocol.preliminary.batch_size=8",
        "protocol.density=0.05",
        "scale=smoke",
        "scale.max_steps=6",
        "scale.evaluation_steps=3",
        "scale.search.max_steps=4",
        "scale.search.trials=2",
        "scale.search.points=[{learning_rate: 0.001, batch_size: 8}]",
        "batch_size=8",
        "device=cpu",
        "progress=false",
        "wandb.mode=disabled",
    ]


@pytest.fixture(scope="session")
def resolved(tmp_path_factory):
    """``with resolved("smoke") as (stages, lists, folder)``: DVC's stages by name, and the experiment's parameters.

    All lies in a folder of its own, outside the repository.
    """
    from dvc.repo import Repo

    from finetune.store.experiment import write_params

    root = Path(__file__).parents[2]

    @contextmanager
    def make(experiment):
        folder = tmp_path_factory.mktemp(experiment)
        shutil.copytree(root / "conf", folder / "conf")
        shutil.copy(root / "dvc.yaml", folder)
        (folder / ".dvc").mkdir()
        (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
        write_params(root / "experiments" / f"{experiment}.yaml", folder / "params.yaml", folder / "conf")
        with Repo(str(folder)) as repo:
            stages = {stage.name: stage for stage in repo.index.stages}
            yield stages, yaml.safe_load((folder / "params.yaml").read_text()), folder

    return make
