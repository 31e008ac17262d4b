"""The pieces of work of a cell: the search of a task, or one run. Each finds what is done of it, and does the rest."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils.memory import should_reduce_batch_size

from finetune.config.launch import is_first_process
from finetune.models.merged import read_merged
from finetune.runs.choices import for_task
from finetune.runs.problem import Problem, Run
from finetune.runs.record_content import named
from finetune.runs.run import forget, run_once
from finetune.runs.search_space import SearchSpace, is_whole
from finetune.store import records
from finetune.tracking.results import send_search
from finetune.training.loop import NonFiniteLoss

log = logging.getLogger(__name__)


class Done(NamedTuple):
    """What came of a piece of work: the name of its file, and why it failed, if it did."""

    file: str
    error: str | None = None


@dataclass(frozen=True)
class Work:
    """A search, or a run, of one model and method.

    Attributes:
        problem: of the model and method.
        results: folder of the experiment.
        task: name.
        seed: of the run; None: it is the search.
    """

    problem: Problem
    results: Path
    task: str
    seed: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        cell = " ".join(self.problem.place.parts)
        return f"{cell} search of {self.task}" if self.seed is None else f"{cell} {self.task} seed {self.seed}"

    @property
    def search(self) -> Work:
        """The search that a run takes its hyper-parameters from."""
        return replace(self, seed=None)

    def folder(self, kind: str) -> Path:
        """``search``, ``runs`` or ``models`` of the model and method."""
        return self.results / kind / self.problem.place

    def look(self) -> Done | None:
        """What there is of it already; None if it is to be done. Of a run its search must be done.

        Raises:
            ValueError: on bad configuration or data.
        """
        if self.seed is None:
            path = self._search_path
            return Done(path.name) if is_searched(self.problem, self._whole, path) else None
        run = self._run()
        path, keep = _files(self.problem, run, self.folder("runs"), self.folder("models"))
        record = _found(self.problem, run, path, keep)
        if record is None:
            return None
        if record["error"] is None:
            _reuse(self.problem, run, path)
        return Done(path.name, record["error"])

    def do(self, deadline: float | None = None) -> Done | None:
        """Do it, if it is not done; None if it can't begin, because its search failed.

        Raises:
            OutOfTime: if the time is over.
            ValueError, OSError: as :func:`finetune.runs.run.run_once`.
        """
        if self.seed is None:
            return self._do_search(deadline)
        if self.problem.searches and self.search.look() is None:
            return None
        path, record = run_missing(self.problem, self._run(), self.folder("runs"), self.folder("models"), deadline)
        return Done(path.name, record["error"])

    def _do_search(self, deadline: float | None) -> Done:
        try:
            _search(self.problem, self._whole, self._search_path, deadline)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not should_reduce_batch_size(error):
                raise
            return Done(self.name, str(error))
        return Done(self._search_path.name)

    @property
    def _search_path(self) -> Path:
        return self.folder("search") / f"{self.task}.json"

    @property
    def _whole(self) -> Run:
        """The search as a run without a point."""
        config = self.problem.config
        steps = for_task(config["scale"]["search"]["max_steps"], self.task)
        return Run(self.task, config["protocol"]["search_seed"], {"max_steps": steps}, search=True)

    def _run(self) -> Run:
        assert self.seed is not None
        best = records.read_record(self._search_path)["best"] if self.problem.searches else None
        return Run(self.task, self.seed, self.problem.hyperparameters(best))


def run_missing(
    problem: Problem, run: Run, folder: Path, models: Path, deadline: float | None = None
) -> tuple[Path, dict[str, Any]]:
    """Do a run that is not finished; returns its record, and where it lies. A lost merged model is made again.

    Args:
        folder: of the record.
        models: of the merged model, where the problem keeps one.
        deadline: see :func:`finetune.runs.run.run_once`, as errors are.
    """
    path, keep = _files(problem, run, folder, models)
    record = _found(problem, run, path, keep)
    if record is None or record["error"] is not None:
        return path, run_once(problem, run, path=path, keep=keep, deadline=deadline)
    _reuse(problem, run, path)
    return path, record


def _reuse(problem: Problem, run: Run, path: Path) -> None:
    log.info("%s is finished, reused", path)
    if is_first_process():
        forget(problem, run)


def _files(problem: Problem, run: Run, folder: Path, models: Path) -> tuple[Path, Path | None]:
    path = folder / f"{run.task}-seed{run.seed}-{problem.digest(run)}.json"
    return path, models / f"seed{run.seed}" if problem.keeps_models else None


def _found(problem: Problem, run: Run, path: Path, keep: Path | None) -> dict[str, Any] | None:
    """The record of a run; None if there is none, or the merged model of a finished one is lost."""
    digest = problem.digest(run)
    record = records.reusable(path, digest)
    if record is None or record["status"] != "finished" or keep is None or _is_of(keep, digest):
        return record
    return None


def _is_of(model: Path, digest: str) -> bool:
    """Whether a merged model is there, whole, and of the run with this hash."""
    try:
        return read_merged(model).get("config_hash") == digest
    except (OSError, ValueError):
        return False


def is_searched(problem: Problem, whole: Run, path: Path) -> bool:
    """Whether a search has its record, whole, with all trials, and as its journal tells it."""
    digest, space = problem.digest(whole), SearchSpace.of(problem.config)
    found, journal = records.reusable(path, digest), path.with_suffix(".journal")
    if found is None or not is_whole(found, space):
        return False
    if journal.is_file():
        from finetune.runs.search import is_told_by

        if not is_told_by(journal, digest, space, found):
            log.warning("%s differs from %s, and is written anew", path, journal)
            return False
    return True


def _search(problem: Problem, whole: Run, path: Path, deadline: float | None) -> None:
    """Search one task; ``whole`` is the search as a run without a point."""
    config, digest = problem.config, problem.digest(whole)
    space = SearchSpace.of(config)

    def objective(point: dict[str, Any], report: Any) -> tuple[float, float]:
        trial = Run(whole.task, whole.seed, {**point, **whole.hyperparameters}, search=True)
        record = run_once(problem, trial, on_evaluation=report, deadline=deadline)
        if record["status"] != "finished":
            raise NonFiniteLoss(record["error"])
        at_best = next(e for e in record["evaluations"] if e["step"] == record["training"]["best_step"])
        return at_best[record["metric"]], min(evaluation["loss"] for evaluation in record["evaluations"])

    told = _told(objective, space, path, digest)
    header = {"schema": records.SCHEMA, "version": config["version"], "run": named(problem, whole)}
    header["identity"] = problem.identity(whole)
    header["run"].pop("seed")  # it stands beside: trials are all of one seed
    content = header | told | {"seed": whole.seed, "provenance": records.provenance()}
    records.write_record(path, content)
    send_search(content, config["wandb"])


def _told(objective: Any, space: SearchSpace, path: Path, digest: str) -> dict[str, Any]:
    """Search, and say what came of it: by Optuna, or where it is not installed by what a grid needs of it."""
    if find_spec("optuna") is None:
        from finetune.runs.grid import run_grid

        return run_grid(objective, space, path.with_suffix(".grid"), digest)
    from finetune.runs.search import run_search, summary
    from finetune.runs.search_journal import open_storage

    return summary(run_search(objective, space, open_storage(path.with_suffix(".journal")), digest), space)
