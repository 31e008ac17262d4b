"""Cells: one (experiment, model, method), all its tasks and seeds. What is finished is never done again.

Plain dictionaries in, files out; the scripts in ``experiments/`` compose the dictionaries with Hydra. Under
``accelerate launch`` every process trains; the first one writes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from finetune.config.launch import is_first_process, processes
from finetune.runs.chat import ChatProblem
from finetune.runs.command import only_writer, read_lists, read_workers
from finetune.runs.glue import GlueProblem
from finetune.runs.problem import Problem, Run
from finetune.runs.work import Done, Work, run_missing
from finetune.runs.workers import Workers, run_all, warm_up
from finetune.store import places, records
from finetune.training.loop import OutOfTime

log = logging.getLogger(__name__)
PROBLEMS: dict[str, type[Problem]] = {"glue": GlueProblem, "chat": ChatProblem}


@dataclass(frozen=True)
class Cell:
    """Where a cell's files go, and what it runs.

    Attributes:
        problem: of one model and method.
        tasks, seeds: what to run.
        results: folder of the experiment: ``gradients``, ``basis``, ``search``, ``runs`` and ``models`` lie in it.
    """

    problem: Problem
    tasks: Sequence[str]
    seeds: Sequence[int]
    results: Path

    @classmethod
    def of(cls, config: Mapping[str, Any], loads: dict[str, Any] | None = None) -> Cell:
        """The cell that a composed configuration and the experiment file ``cell`` name.

        Args:
            config: ``workers: auto`` is what the experiment says.
            loads: what cells of one process share.

        Raises:
            ValueError: if the file is missing or lacks a list.
        """
        file = config["cell"] or "params.yaml"
        given = read_workers(file) if config["workers"] == "auto" else config["workers"]
        problem = make_problem({**config, "workers": given}, loads)
        lists = read_lists(file, problem.lists)
        *tasks, seeds = lists.values()
        return cls(problem, tasks[0] if tasks else [problem.task], seeds, Path("results") / config["name"])

    def check_seeds(self) -> None:
        """Refuse the seed that the search had.

        Raises:
            ValueError: if it is one of them.
        """
        protocol, scale = self.problem.config["protocol"], self.problem.config["scale"]
        if "search" in protocol and scale.get("search") and protocol["search_seed"] in self.seeds:
            seeds = list(self.seeds)
            raise ValueError(f"seed {protocol['search_seed']} is the search's; seeds={seeds} must be others.")

    def folder(self, kind: str) -> Path:
        """A folder of this model and method: ``search``, ``runs`` or ``models``."""
        return self.results / kind / self.problem.place

    def shared(self, kind: str) -> Path:
        """A folder that all methods of the model share: ``gradients`` or ``basis``."""
        return self.results / kind / self.problem.config["model"]["name"]

    def writer(self) -> AbstractContextManager[None]:
        """Hold the folders of this model and method, which must be there for DVC, for this process."""
        runs, *others = (self.folder(kind) for kind in ("runs", "search", "models"))
        return only_writer(runs, self.problem.config["checkpoints"], *others)


def make_problem(config: Mapping[str, Any], loads: dict[str, Any] | None = None) -> Problem:
    """The problem that ``problem`` names."""
    return PROBLEMS[config["problem"]](config, loads)


def run_by_hand(config: Mapping[str, Any]) -> float:
    """A run by hand; the record lands under ``output``, its merged model beside it. Returns its score.

    Raises:
        ValueError: if the run fails.
    """
    problem = make_problem(config)
    run = Run(problem.task, config["seed"], problem.hyperparameters())
    folder = Path(config["output"]) / problem.place
    places.check_writable(folder)
    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
    path, record = run_missing(problem, run, folder, folder)
    if record["status"] != "finished":
        raise ValueError(f"{path}: {record['error']}")
    before = f" (before: {record['baseline']['loss']:.4f})" if problem.baseline else ""
    log.info("%s = %.4f%s  %s", record["metric"], record["score"], before, path)
    return record["score"]


def train_cell(cell: Cell) -> None:
    """All runs of a cell, after the searches that are missing; writes records and ``cell.json``, which lists them.

    Raises:
        ValueError: if a seed was the search's, or any run failed (after all others are done).
    """
    cell.check_seeds()
    with cell.writer():
        run_cells([cell]).check()


def search_cell(cell: Cell) -> None:
    """The hyper-parameter searches of a cell: a journal and a ``<task>.json`` with best point and all trials each.

    Raises:
        ValueError: if protocol or scale has no search, several processes run as one, or a search failed (after all
            others are done).
    """
    protocol, scale = cell.problem.config["protocol"], cell.problem.config["scale"]
    for group, content in (("protocol", protocol), ("scale", scale)):
        if not content.get("search"):
            raise ValueError(f"{group}={content['name']} searches nothing: its hyper-parameters are given.")
    with cell.writer():
        works = [Work(cell.problem, cell.results, task) for task in cell.tasks]
        _do_missing(works, found := _look(works), None)
        Outcome(works, found).check()


@dataclass(frozen=True)
class Outcome:
    """What came of the work on some cells.

    Attributes:
        works: all of it, in order.
        found: what is done, or failed.
        over: whether it ended because the time was over.
    """

    works: Sequence[Work]
    found: Mapping[Work, Done]
    over: bool = False

    @property
    def left(self) -> list[Work]:
        """What is to be done yet."""
        return [work for work in self.works if work not in self.found]

    def failed(self) -> list[str]:
        """A line for each search and run that failed."""
        found = [self.found[work] for work in self.works if work in self.found]
        return [f"{done.file}: {done.error}" for done in found if done.error is not None]

    def check(self) -> None:
        """Tell of what failed.

        Raises:
            ValueError: if anything did.
        """
        if failed := self.failed():
            raise ValueError(f"{len(failed)} of {len(self.works)} searches and runs failed; " + "; ".join(failed))


def in_order(cells: Sequence[Cell]) -> list[Work]:
    """All work of cells, the most telling first: breadth before depth.

    For each task, in the cells' order, the searches of all cells, then the first seed of all; then the next seed.
    """
    placed = []
    for number, cell in enumerate(cells):
        for t, task in enumerate(cell.tasks):
            if cell.problem.searches:
                placed.append(((0, t, 0, number), Work(cell.problem, cell.results, task)))
            for s, seed in enumerate(cell.seeds):
                placed.append(((s, t, 1, number), Work(cell.problem, cell.results, task, seed)))
    return [work for _, work in sorted(placed, key=itemgetter(0))]


def run_cells(cells: Sequence[Cell], deadline: float | None = None) -> Outcome:
    """The searches and runs of cells that are missing, in their order, on the workers that the configuration names.

    A cell of which all is done gets its ``cell.json``. Whoever calls it holds the cells.

    Args:
        cells: of one experiment.
        deadline: ``time.time()`` when the time is over: then what runs writes a checkpoint, and the next call goes on.

    Raises:
        ValueError: on bad configuration or data, or if a worker's process died.
    """
    works = in_order(cells)
    warm_up(Workers.of(cells[0].problem.config))
    found = _look(works)
    try:
        over = _do_missing(works, found, deadline)
    finally:
        for cell in cells:
            _list_records(cell, found)
    return Outcome(works, found, over)


def _look(works: Sequence[Work]) -> dict[Work, Done]:
    """What is done already, or failed."""
    found: dict[Work, Done] = {}
    for work in works:
        known = work.seed is None or not work.problem.searches or work.search in found
        if known and (done := work.look()) is not None:
            found[work] = done
    return found


def _do_missing(works: Sequence[Work], found: dict[Work, Done], deadline: float | None) -> bool:
    """Do what is missing, and what failed last; adds to what is found. Whether the time was over before the end."""
    config = works[0].problem.config
    left = [work for work in works if work not in found]
    left += [work for work in works if work in found and found[work].error is not None]
    number = {work: place for place, work in enumerate(left)}
    if processes()[1] > 1 and any(work.seed is None for work in left):  # each process would ask for points of its own
        raise ValueError("a search is one process: run experiments/search.py by python first, then this again.")

    def note(place: int, done: Done | None) -> None:
        if done is not None:
            found[left[place]] = done

    try:
        run_all(
            [partial(Work.do, work, deadline) for work in left],
            replace(Workers.of(config), deadline=deadline),
            label="runs",
            bar=config["progress"],
            names=[work.name for work in left],
            after=[None if work.seed is None else number.get(work.search) for work in left],
            note=note,
        )
    except OutOfTime:
        log.info("the time is over")
        return True
    return False


def _list_records(cell: Cell, found: Mapping[Work, Done]) -> None:
    """Write the list of a cell's records, if all are there."""
    runs = [Work(cell.problem, cell.results, task, seed) for task in cell.tasks for seed in cell.seeds]
    if not is_first_process() or any(run not in found for run in runs):
        return
    folder, names = cell.folder("runs"), [found[run].file for run in runs]
    _keep_only(folder, names)
    records.write_json(folder / "cell.json", {"records": names})


def _keep_only(folder: Path, listed: Sequence[str]) -> None:
    """Move records of earlier configurations aside: kept, but no longer the cell's."""
    for path in folder.glob("*-seed*-*.json"):
        if path.name not in listed:
            (folder / "earlier").mkdir(exist_ok=True)
            shutil.move(path, folder / "earlier" / path.name)
