"""An experiment's runs for a machine with torch, transformers, accelerate and peft alone: a folder that travels there.

    python -m finetune.runs.carry experiments/hour.yaml outputs/carried/hour

It holds the composed configuration of every cell, tokenised data, bases, and the records that are finished; with the
code and the weights, :mod:`finetune.runs.carried` does the rest of the runs there, under the same hashes.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.tokenised import save_split
from finetune.runs.cells import Cell
from finetune.runs.slices import composed_cells
from finetune.runs.work import Work
from finetune.store.archive import check, is_list, stage_files
from finetune.store.boundary import exit_with_message
from finetune.store.experiment import write_params
from finetune.store.files import folder_atomically, sha256, write_atomically
from finetune.store.origin import origin_of
from finetune.store.pack import CARRIED
from finetune.store.records import write_json

log = logging.getLogger("finetune.runs.carry")


def carry(experiment: Path, target: Path) -> None:
    """Write the folder, whole or not at all.

    Args:
        experiment: its file; its data, bases and results lie in the working folder.
        target: where the folder shall be; nothing may be there.

    Raises:
        ValueError: if something is there, on bad configuration or data, or without bases that a method needs.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there, and may hold what was done of it: give INTO=FOLDER, or move it away.")
    loads: dict[str, Any] = {}
    with folder_atomically(target) as folder:
        write_params(experiment, params := folder / "params.yaml")
        cells = [Cell.of(config, loads) for config in composed_cells(params)]
        params.unlink()
        entries = [entry for cell in cells if (entry := _cell(cell, folder))["seeds"]]
        _results(cells, folder, origin := origin_of(experiment))
        paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        files = {path.as_posix(): sha256(folder / path) for path in paths if path.parts[0] != "results"}
        content = {"origin": origin, "cells": entries, "weights": _weights(cells), "files": files}
        write_json(folder / CARRIED, content)
    for model, found in content["weights"].items():
        log.info("%s needs the weights of %s in %s below --weights", target, model, found["folder"])
    log.info("%s: %d cells, %.0f MB", target, len(entries), _size(target) / 1e6)


def _cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """A cell's entry: its configuration, with the files that it reads, and what is to be run."""
    problem, config = cell.problem, {**cell.problem.config, "cell": None}
    splits: dict[str, dict[str, str]] = {}
    for task in cell.tasks:
        splits[task] = {role: _split(split, folder) for role, split in problem.splits(task).items()}
        if problem.basis_scope == "task":
            problem.bases(task)  # refuses those of other weights or data
            _copy(Path(config["basis"]) / f"{task}.safetensors", folder / "basis" / config["model"]["name"])
    config["carried"] = {"splits": splits, **problem.carried_facts()}
    return {"config": config, "tasks": list(cell.tasks), "seeds": _seeds(cell)}


def _seeds(cell: Cell) -> Sequence[int]:
    """Of a cell that keeps merged models, which do not travel, those that are not done here."""
    if not cell.problem.keeps_models:
        return list(cell.seeds)
    return [seed for seed in cell.seeds if not all(_is_done(cell, task, seed) for task in cell.tasks)]


def _is_done(cell: Cell, task: str, seed: int) -> bool:
    done = Work(cell.problem, cell.results, task, seed).look()
    return done is not None and done.error is None


def _split(split: Any, folder: Path) -> str:
    """Write a tokenised split, once for all cells that read it; returns its file."""
    name = f"data/{split.content[:12]}.safetensors"
    if not (folder / name).exists():
        save_split(folder / name, split)
    return name


def _copy(source: Path, folder: Path) -> None:
    if not (folder / source.name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / source.name)


def _results(cells: Sequence[Cell], folder: Path, origin: Mapping[str, Any]) -> None:
    """What is finished of cells that keep no models: records of runs and of searches; their journals stay."""
    results = cells[0].results
    check(results, found := stage_files(results), origin)
    kept = {cell.problem.config["model"]["name"] for cell in cells if cell.problem.keeps_models}
    for name, content in found.items():
        if name.startswith(("runs/", "search/")) and name.endswith(".json") and not is_list(name):
            if name.split("/")[1] in kept:
                continue
            write_atomically(folder / "results" / origin["experiment"] / name, content)


def _weights(cells: Sequence[Cell]) -> dict[str, Any]:
    """The checkpoints that the runs start from: where they lie below ``data.root``, and the hashes of their content."""
    problems = {cell.problem.config["model"]["name"]: cell.problem for cell in cells}
    return {name: {"folder": one.config["model"]["folder"], **one.contents} for name, one in problems.items()}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with exit_with_message():
        carry(*map(Path, sys.argv[1:3]))
