"""Cells: one (experiment, model, method), all its tasks and seeds in one process. What is finished is never done again.

Plain dictionaries in, files out; the scripts in ``experiments/`` compose the dictionaries with Hydra.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from finetune import models
from finetune.runs.glue import Inputs, collect_for_run, for_task, identity, train_run
from finetune.store import records
from finetune.training import gradients
from finetune.training.loop import NonFiniteLoss, make_accelerator
from sparsegrad import load_tensors, save_bases, save_tensors

log = logging.getLogger(__name__)


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Turn a user's error into one line on standard error and exit code 1; programming errors keep their traceback."""
    try:
        yield
    except (ValueError, ImportError) as error:
        log.debug("traceback", exc_info=True)
        raise SystemExit(f"error: {error}") from None


@contextmanager
def only_writer(folder: Path, locks: str | Path) -> Iterator[None]:
    """Hold a cell's folder for this process; the system frees it when the process ends, however it ends.

    Of several processes of one run the first holds it.

    A kill of dvc alone leaves its stage running, and the next ``dvc repro`` would start a second writer.

    Raises:
        ValueError: if another process holds it.
    """
    if not is_first_process():
        yield
        return
    path = Path(locks) / f"{folder.as_posix().strip('/').replace('/', '-')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is working on this cell; wait for it, or end it.") from None
        yield


def read_lists(path: str | Path, names: Sequence[str] = ("tasks", "seeds")) -> dict[str, list[Any]]:
    """Lists of an experiment file.

    Raises:
        ValueError: if the file is missing or a list is missing or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a cell needs an experiment file such as params.yaml.")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, no mapping with lists {list(names)}.")
    lists = {}
    for name in names:
        if not isinstance(content.get(name), list) or not content[name]:
            raise ValueError(f"{path}: {name!r} is {content.get(name)!r}; it must be a list of at least one.")
        lists[name] = content[name]
    return lists


def run_one(config: Mapping[str, Any]) -> float:
    """A run by hand; the record lands under ``output``. Returns its score.

    Raises:
        ValueError: if the run fails.
    """
    set_threads(config)
    inputs, task, seed = Inputs(config), config["data"]["task"], config["seed"]
    chosen = hyperparameters(config, None)
    folder = Path(config["output"]) / config["model"]["name"] / config["method"]["name"]
    record, path = _run_or_reuse(inputs, task, seed, chosen, folder)
    if record["status"] != "finished":
        raise ValueError(f"{path}: {record['error']}")
    log.info("%s = %.4f  %s", record["metric"], record["score"], path)
    return record["score"]


def train_cell(
    config: Mapping[str, Any], tasks: Sequence[str], seeds: Sequence[int], folder: Path, search: Path
) -> None:
    """All runs of a cell; writes their records and ``cell.json``, which lists them.

    Args:
        config: composed configuration.
        tasks, seeds: what to run.
        folder: for the records of this cell.
        search: results of the search of this cell, ``<task>.json`` each.

    Raises:
        ValueError: if a seed was the search's, or any run failed (after all others are done).
    """
    set_threads(config)
    if config["protocol"]["search_seed"] in seeds:
        raise ValueError(f"seed {config['protocol']['search_seed']} is the search's; seeds={seeds} must be others.")
    inputs, listed, failed = Inputs(config), [], []
    for task in tqdm(tasks, desc="tasks", disable=not config["progress"]):
        chosen = hyperparameters(config, search / f"{task}.json")
        for seed in tqdm(seeds, desc=task, disable=not config["progress"], leave=False):
            record, path = _run_or_reuse(inputs, task, seed, chosen, folder)
            listed.append(path.name)
            if record["status"] != "finished":
                failed.append(f"{path.name}: {record['error']}")
    if is_first_process():
        keep_only(folder, listed)
        records.write_json(folder / "cell.json", {"records": listed})
    if failed:
        raise ValueError(f"{len(failed)} of {len(listed)} runs failed; " + "; ".join(failed))


def search_cell(config: Mapping[str, Any], tasks: Sequence[str], folder: Path) -> None:
    """The hyper-parameter searches of a cell: a journal and a ``<task>.json`` with best point and all trials each."""
    from finetune.runs.search import SearchSpace, open_storage, run_search, summary

    set_threads(config)
    inputs, protocol, settings = Inputs(config), config["protocol"], config["scale"]["search"]
    space = SearchSpace(
        learning_rate=tuple(protocol["search"]["learning_rate"]),
        batch_sizes=tuple(protocol["search"]["batch_sizes"]),
        trials=settings["trials"],
        points=tuple(settings["points"]),
        startup_trials=settings["pruning"]["startup_trials"],
        warmup_steps=settings["pruning"]["warmup_steps"],
        seed=protocol["search_seed"],
    )
    for task in tqdm(tasks, desc="tasks", disable=not config["progress"]):
        steps = for_task(settings["max_steps"], task)
        base = identity(inputs, task, protocol["search_seed"], {"max_steps": steps}, "search")
        digest = records.config_hash(base)

        def objective(
            point: dict[str, Any], report: Any, task: str = task, steps: int | None = steps
        ) -> tuple[float, float]:
            chosen = point | {"max_steps": steps}
            record = train_run(inputs, task, protocol["search_seed"], chosen, kind="search", on_evaluation=report)
            if record["status"] != "finished":
                raise NonFiniteLoss(record["error"])
            return record["score"], min(evaluation["loss"] for evaluation in record["evaluations"])

        study = run_search(objective, space, open_storage(folder / f"{task}.journal"), digest)
        header = {
            "experiment": config["name"],
            "kind": "search",
            "model": config["model"]["name"],
            "method": config["method"]["name"],
            "task": task,
            "protocol": protocol["name"],
            "scale": config["scale"]["name"],
            "config_hash": digest,
        }
        content = {"schema": records.SCHEMA, "version": config["version"], "run": header} | summary(study, space)
        content |= {"seed": protocol["search_seed"], "provenance": records.provenance()}
        records.write_json(folder / f"{task}.json", content)


def gradients_cell(config: Mapping[str, Any], tasks: Sequence[str], folder: Path) -> None:
    """Moments of the preliminary phase of every task, ``<task>.safetensors`` each."""
    set_threads(config)
    inputs = Inputs(config)
    device = make_accelerator(config["device"], "fp32").device
    for task in tqdm(tasks, desc="tasks", disable=not config["progress"]):
        facts, splits = inputs.task(task)
        seed = config["protocol"]["search_seed"]
        model = models.load_classifier(config["model"], config["data"]["root"], facts.num_labels, seed).to(device)
        collected = collect_for_run(inputs, model, splits["train"], seed, device)
        metadata = collected.facts | {
            "content": "moments",
            "model": config["model"]["name"],
            "model_sha256": inputs.fingerprint,
            "task": task,
            "data_sha256": splits["train"].sha256,
            "preliminary": dict(config["protocol"]["preliminary"]),
        }
        save_tensors(folder / f"{task}.safetensors", gradients.pack(collected), metadata)


def basis_cell(tasks: Sequence[str], source: Path, folder: Path, *, device: str, threads: int | None) -> None:
    """HOSVD of every task's moments: ``<task>.safetensors`` with float32 bases; times in ``hosvd.json``."""
    if threads is not None:
        torch.set_num_threads(threads)
    place = make_accelerator(device, "fp32").device
    report = {}
    for task in tqdm(tasks, desc="hosvd", leave=False):
        tensors, facts = load_tensors(source / f"{task}.safetensors")
        if facts.get("content") != "moments":
            raise ValueError(f"{source / task}.safetensors holds {facts.get('content')!r}, not moments.")
        started = time.perf_counter()
        collected = gradients.unpack({name: tensor.to(place) for name, tensor in tensors.items()}, facts)
        bases = collected.bases()
        report[task] = {"seconds": time.perf_counter() - started, "gradients": facts["gradients"]}
        for basis in bases.values():
            basis.to(dtype=torch.float32)
        save_bases(folder / f"{task}.safetensors", bases, facts | {"content": "bases"})
    records.write_json(folder / "hosvd.json", report)


def hyperparameters(config: Mapping[str, Any], search: Path | None) -> dict[str, Any]:
    """Learning rate and batch size: given by hand, else the search's best, else the scale's.

    Raises:
        ValueError: if a search result is expected and missing.
    """
    best = records.read_json(search)["best"] if search is not None else config["scale"]
    return {name: config[name] if config[name] is not None else best[name] for name in ("learning_rate", "batch_size")}


def _run_or_reuse(
    inputs: Inputs, task: str, seed: int, chosen: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], Path]:
    digest = records.config_hash(identity(inputs, task, seed, chosen, "train"))
    path = records.find_finished(folder, digest)
    if path is not None:
        log.info("%s is finished, reused", path)
        return records.read_json(path), path
    record = train_run(inputs, task, seed, chosen)
    path = folder / f"{task}-seed{seed}-{digest}.json"
    if is_first_process():
        records.write_json(path, record)
    return record, path


def is_first_process() -> bool:
    """Whether this is the process that writes, of those that ``accelerate launch`` or ``torchrun`` started."""
    return int(os.environ.get("RANK", "0")) == 0


def keep_only(folder: Path, listed: Sequence[str]) -> None:
    """Move records of earlier configurations aside: kept, but no longer the cell's."""
    for path in folder.glob("*-seed*-*.json"):
        if path.name not in listed:
            (folder / "earlier").mkdir(exist_ok=True)
            shutil.move(path, folder / "earlier" / path.name)


def set_threads(config: Mapping[str, Any]) -> None:
    """Torch's CPU threads, where ``threads`` is given."""
    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
