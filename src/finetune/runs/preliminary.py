"""The stages before a cell: moments of gradients, and their HOSVD, which all methods of a model share."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from finetune.runs.cells import Cell
from finetune.runs.command import only_writer
from finetune.runs.problem import Problem
from finetune.runs.workers import Workers, run_all
from finetune.store import records
from finetune.training import gradients
from finetune.training.processes import make_accelerator
from sparsegrad import Basis, load_tensors, save_bases, save_tensors


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
