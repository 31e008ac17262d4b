"""Cells: one (experiment, model, method), all its tasks and seeds. What is finished is never done again.

Plain dictionaries in, files out; the scripts in ``experiments/`` compose the dictionaries with Hydra. Under
``accelerate launch`` every process trains; the first one writes.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finetune.config.launch import is_first_process, processes
from finetune.models.merged import read_merged
from finetune.runs.chat import ChatProblem
from finetune.runs.command import only_writer, read_lists
from finetune.runs.glue import GlueProblem
from finetune.runs.problem import Problem, Run, for_task
from finetune.runs.record_content import named
from finetune.runs.run import forget, run_once
from finetune.runs.workers import Workers, run_all, warm_up
from finetune.store import places, records
from finetune.tracking.results import send_search
from finetune.training import gradients
from finetune.training.loop import NonFiniteLoss
from finetune.training.processes import make_accelerator
from sparsegrad import Basis, load_tensors, save_bases, save_tensors

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
    def of(cls, config: Mapping[str, Any]) -> Cell:
        """The cell that a composed configuration and the experiment file ``cell`` name.

        Raises:
            ValueError: if the file is missing or lacks a list.
        """
        problem = make_problem(config)
        lists = read_lists(config["cell"] or "params.yaml", problem.lists)
        *tasks, seeds = lists.values()
        return cls(problem, tasks[0] if tasks else [problem.task], seeds, Path("results") / config["name"])

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


def make_problem(config: Mapping[str, Any]) -> Problem:
    """The problem that ``problem`` names."""
    return PROBLEMS[config["problem"]](config)


def run_by_hand(config: Mapping[str, Any]) -> float:
    """A run by hand; the record lands under ``output``, its merged model beside it. Returns its score.

    Raises:
        ValueError: if the run fails.
    """
    problem = make_problem(config)
    run = Run(problem.task, config["seed"], problem.hyperparameters())
    folder = Path(config["output"]) / problem.place
    places.check_writable(folder)
    ((path, record),) = _run_missing(problem, [run], folder, folder, Workers(threads=config["threads"])).items()
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
    protocol = cell.problem.config["protocol"]
    if cell.problem.searches and protocol["search_seed"] in cell.seeds:
        raise ValueError(f"seed {protocol['search_seed']} is the search's; seeds={list(cell.seeds)} must be others.")
    with cell.writer():
        if cell.problem.searches:
            _search_missing(cell)
        _train_missing(cell)


def _train_missing(cell: Cell) -> None:
    problem, workers, runs = cell.problem, Workers.of(cell.problem.config), []
    for task in cell.tasks:
        best = records.read_record(cell.folder("search") / f"{task}.json")["best"] if problem.searches else None
        runs += [Run(task, seed, problem.hyperparameters(best)) for seed in cell.seeds]
    folder = cell.folder("runs")
    found = _run_missing(problem, runs, folder, cell.folder("models"), workers)
    if is_first_process():
        _keep_only(folder, [path.name for path in found])
        records.write_json(folder / "cell.json", {"records": [path.name for path in found]})
    failed = [f"{path.name}: {record['error']}" for path, record in found.items() if record["status"] != "finished"]
    if failed:
        raise ValueError(f"{len(failed)} of {len(found)} runs failed; " + "; ".join(failed))


def _run_missing(
    problem: Problem, runs: Sequence[Run], folder: Path, models: Path, workers: Workers
) -> dict[Path, dict[str, Any]]:
    """Do what is not finished; returns records by path. One whose merged model is lost is made again."""
    warm_up(workers)
    found, jobs = {}, {}
    for run in runs:
        digest = problem.digest(run)
        path = folder / f"{run.task}-seed{run.seed}-{digest}.json"
        keep = models / f"seed{run.seed}" if problem.keeps_models else None
        found[path] = records.reusable(path, digest) or {}
        if found[path].get("status") != "finished" or (keep is not None and not _is_of(keep, digest)):
            jobs[path] = partial(run_once, problem, run, path=path, keep=keep)
        else:
            log.info("%s is finished, reused", path)
            if is_first_process():
                forget(problem, run)
    names = [path.stem for path in jobs]
    done = run_all(list(jobs.values()), workers, label="runs", bar=problem.config["progress"], names=names)
    return found | dict(zip(jobs, done, strict=True))


def _is_of(model: Path, digest: str) -> bool:
    """Whether a merged model is there, whole, and of the run with this hash."""
    try:
        return read_merged(model).get("config_hash") == digest
    except (OSError, ValueError):
        return False


def _keep_only(folder: Path, listed: Sequence[str]) -> None:
    """Move records of earlier configurations aside: kept, but no longer the cell's."""
    for path in folder.glob("*-seed*-*.json"):
        if path.name not in listed:
            (folder / "earlier").mkdir(exist_ok=True)
            shutil.move(path, folder / "earlier" / path.name)


def search_cell(cell: Cell) -> list[Path]:
    """The hyper-parameter searches of a cell: a journal and a ``<task>.json`` with best point and all trials each.

    Returns:
        The files that were written now; those of finished searches stay as they are.

    Raises:
        ValueError: if the protocol has no search, or several processes run as one.
    """
    with cell.writer():
        return _search_missing(cell)


def _search_missing(cell: Cell) -> list[Path]:
    problem, folder = cell.problem, cell.folder("search")
    protocol = problem.config["protocol"]
    if "search" not in protocol:
        raise ValueError(f"protocol={protocol['name']} searches nothing: its hyper-parameters are given.")
    workers, jobs, paths = Workers.of(problem.config), [], []
    warm_up(workers)
    for task in cell.tasks:
        steps, path = for_task(problem.config["scale"]["search"]["max_steps"], task), folder / f"{task}.json"
        whole = Run(task, protocol["search_seed"], {"max_steps": steps}, search=True)
        if not _is_searched(problem, whole, path):
            jobs.append(partial(_search, problem, whole, path))
            paths.append(path)
    if jobs and processes()[1] > 1:  # each process would ask for points of its own
        raise ValueError("a search is one process: run experiments/search.py by python first, then this again.")
    names = [f"search of {path.stem}" for path in paths]
    run_all(jobs, workers, label="searches", bar=problem.config["progress"], names=names)
    return paths


def _is_searched(problem: Problem, whole: Run, path: Path) -> bool:
    """Whether a search has its record, whole, with all trials, and as its journal tells it."""
    from finetune.runs.search import SearchSpace, is_told_by, is_whole

    digest, space = problem.digest(whole), SearchSpace.of(problem.config)
    found, journal = records.reusable(path, digest), path.with_suffix(".journal")
    if found is None or not is_whole(found, space):
        return False
    if journal.is_file() and not is_told_by(journal, digest, space, found):
        log.warning("%s differs from %s, and is written anew", path, journal)
        return False
    return True


def _search(problem: Problem, whole: Run, path: Path) -> None:
    """Search one task; ``whole`` is the search as a run without a point."""
    from finetune.runs.search import SearchSpace, run_search, summary
    from finetune.runs.search_journal import open_storage

    config, digest = problem.config, problem.digest(whole)
    space = SearchSpace.of(config)

    def objective(point: dict[str, Any], report: Any) -> tuple[float, float]:
        trial = Run(whole.task, whole.seed, {**point, **whole.hyperparameters}, search=True)
        record = run_once(problem, trial, on_evaluation=report)
        if record["status"] != "finished":
            raise NonFiniteLoss(record["error"])
        at_best = next(e for e in record["evaluations"] if e["step"] == record["training"]["best_step"])
        return at_best[record["metric"]], min(evaluation["loss"] for evaluation in record["evaluations"])

    study = run_search(objective, space, open_storage(path.with_suffix(".journal")), digest)
    header = {"schema": records.SCHEMA, "version": config["version"], "run": named(problem, whole)}
    header["identity"] = problem.identity(whole)
    header["run"].pop("seed")  # it stands beside: trials are all of one seed
    content = header | summary(study, space) | {"seed": whole.seed, "provenance": records.provenance()}
    records.write_record(path, content)
    send_search(content, config["wandb"])


def gradients_cell(cell: Cell) -> None:
    """Moments of the preliminary phase of every task, ``<task>.safetensors`` each."""
    problem, config = cell.problem, cell.problem.config
    folder = cell.shared("gradients")
    jobs = [partial(_gradients, problem, task, folder / f"{task}.safetensors") for task in cell.tasks]
    with only_writer(folder, config["checkpoints"]):
        run_all(jobs, Workers(threads=config["threads"]), label="gradients", bar=config["progress"])


def _gradients(problem: Problem, task: str, path: Path) -> None:
    device, seed = make_accelerator(problem.config["device"], "fp32").device, problem.gradients_seed
    collected = problem.collect(problem.gradient_model(task, seed), task, seed, device)
    made = problem.made_for(task) | {"content": "moments"}
    save_tensors(path, gradients.pack(collected), collected.facts | made)


def basis_cell(cell: Cell) -> None:
    """HOSVD of every task's moments: ``<task>.safetensors`` with float32 bases; times by layer kind in ``hosvd.json``.

    One layer kind at a time lies on the device: of LLaMa-2's matrices (11,008 x 4,096) one kind's moments take 1.1 GB,
    its decomposition a few times that.
    """
    folder = cell.shared("basis")
    with only_writer(folder, cell.problem.config["checkpoints"]):
        _bases(cell, folder)


def _bases(cell: Cell, folder: Path) -> None:
    config, report = cell.problem.config, {}
    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
    place = make_accelerator(config["device"], "fp32").device
    for task in tqdm(cell.tasks, desc="hosvd", leave=False, disable=not config["progress"]):
        source = cell.shared("gradients") / f"{task}.safetensors"
        tensors, facts = load_tensors(source)
        if facts.get("content") != "moments":
            raise ValueError(f"{source} holds {facts.get('content')!r}, not moments.")
        collected, bases, report[task] = gradients.unpack(tensors, facts), {}, {}
        del tensors
        for kind in list(collected.moments):
            started = time.perf_counter()
            moments = collected.moments[kind]
            moments.left, moments.right = moments.left.to(place), moments.right.to(place)
            basis = collected.basis(kind)
            bases[kind] = Basis(basis.U.float().cpu(), basis.V.float().cpu())
            del collected.moments[kind], basis
            report[task][kind] = {"seconds": time.perf_counter() - started, "gradients": facts["gradients"][kind]}
        save_bases(folder / f"{task}.safetensors", bases, facts | {"content": "bases"})
    records.write_json(folder / "hosvd.json", report)
