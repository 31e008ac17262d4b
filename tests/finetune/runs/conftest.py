"""What the tests of runs share: cells in a folder, runs that fail or die, records without their times."""

import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.runs import cells, chat, glue, record_content
from finetune.runs import run as running
from finetune.runs.problem import Run
from finetune.runs.run import run_once
from finetune.store import records
from finetune.training import loop
from finetune.training.loop import NonFiniteLoss

BEST = {"learning_rate": 1e-3, "batch_size": 8}
TIMES = ("seconds", "step_seconds_median", "resumed", "damaged_checkpoints")


class Killed(BaseException):
    """Like a signal: nothing may catch it."""


@pytest.fixture
def numbers():
    """``numbers(record)``: what may not depend on time or on a kill."""

    def make(record):
        kept = {key: value for key, value in record.items() if key not in ("provenance", "checksum")}
        return kept | {"training": {key: value for key, value in record["training"].items() if key not in TIMES}}

    return make


@pytest.fixture
def once(config, chat_config):
    """``once("method=lora", task="cola", seed=1, chosen=..., keep=...)``: one run of GLUE, or on dialogues."""

    def make(*overrides, task="cola", seed=1, chosen=None, **others):
        kind, found = (chat.ChatProblem, chat_config) if task == chat.TASK else (glue.GlueProblem, config)
        problem = kind(found(*overrides))
        return run_once(problem, Run(task, seed, chosen or problem.hyperparameters()), **others)

    return make


@pytest.fixture
def cell_of(config, chat_config, tmp_path):
    """``cell_of("method=lora", tasks=["cola"], seeds=[1, 2], chat=False, **entries)``: a cell below tmp_path."""

    def make(*overrides, tasks=("cola",), seeds=(1, 2), chat=False, **entries):
        found = (chat_config if chat else config)(*overrides) | entries
        return cells.Cell(cells.make_problem(found), ["oasst1"] if chat else list(tasks), list(seeds), tmp_path)

    return make


@pytest.fixture
def trained(monkeypatch):
    """The (task, seed) of every run that is really done from here on."""
    done, header = [], record_content.header

    def note(problem, run):
        done.append((run.task, run.seed))
        return header(problem, run)

    monkeypatch.setattr(record_content, "header", note)
    return done


@pytest.fixture
def diverge(monkeypatch):
    """``with diverge(1, 2): ...``: the runs of these seeds fail."""
    train = running.train

    @contextmanager
    def make(*seeds):
        def fail(training):
            if training.options.seed in seeds:
                raise NonFiniteLoss("loss is nan at step 3; lower learning_rate=0.001 or check the data.")
            return train(training)

        with monkeypatch.context() as patch:
            patch.setattr(running, "train", fail)
            yield

    return make


@pytest.fixture
def killed(monkeypatch):
    """``killed(3, call)``: call until the evaluation with this number, in which the process dies."""

    def make(number, call):
        seen = []

        def dying(real):
            def evaluate(*arguments):
                seen.append(arguments)
                if len(seen) == number:
                    raise Killed
                return real(*arguments)

            return evaluate

        with monkeypatch.context() as patch:
            patch.setattr(glue, "evaluate", dying(glue.evaluate))
            patch.setattr(chat, "evaluate_causal", dying(chat.evaluate_causal))
            with pytest.raises(Killed):
                call()

    return make


@pytest.fixture
def read():
    """``read(folder)``: the records that a cell lists, by (task, seed)."""

    def make(folder: Path):
        return {(r["run"]["task"], r["run"]["seed"]): r for _, r in records.iterate(folder)}

    return make


@pytest.fixture
def clock(monkeypatch):
    """``clock(5)``: the time is over when it was asked for five times."""

    def make(number):
        left = iter([-1.0] * number)
        monkeypatch.setattr(loop, "time", SimpleNamespace(time=lambda: next(left, 1.0), monotonic=time.monotonic))

    return make
