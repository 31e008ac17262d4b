"""Cells of the decoder's runs: gradients, bases, all seeds of one (model, method). What is finished is not done again.

Under ``accelerate launch`` every process trains; the first one writes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finetune.runs.cells import is_first_process, keep_only, set_threads
from finetune.runs.chat import MERGED, chat_run, collect_gradients, load_for_gradients
from finetune.runs.chat_inputs import TASK, ChatInputs, identity
from finetune.store import records
from finetune.training import gradients
from finetune.training.loop import make_accelerator
from sparsegrad import Basis, load_tensors, save_bases, save_tensors

log = logging.getLogger(__name__)


def gradients_cell(config: Mapping[str, Any], path: Path) -> None:
    """Moments of the preliminary phase, into one safetensors file."""
    set_threads(config)
    inputs = ChatInputs(config)
    device = make_accelerator(config["device"], "fp32").device
    seed = config["seed"]
    collected = collect_gradients(inputs, load_for_gradients(inputs, seed), seed, device)
    metadata = collected.facts | inputs.facts | {"content": "moments", "model": config["model"]["name"]}
    save_tensors(path, gradients.pack(collected), metadata)


def basis_cell(source: Path, path: Path, *, device: str, threads: int | None) -> None:
    """HOSVD of the moments, one layer kind at a time on the device; float32 bases, and times in a JSON file beside.

    Of LLaMa-2's matrices (11,008 x 4,096) one kind's moments take 1.1 GB, its decomposition a few times that.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    place = make_accelerator(device, "fp32").device
    tensors, facts = load_tensors(source)
    if facts.get("content") != "moments":
        raise ValueError(f"{source} holds {facts.get('content')!r}, not moments.")
    collected, bases, report = gradients.unpack(tensors, facts), {}, {}
    del tensors
    for kind in tqdm(list(collected.moments), desc="hosvd", leave=False):
        started = time.perf_counter()
        moments = collected.moments[kind]
        moments.left, moments.right = moments.left.to(place), moments.right.to(place)
        basis = collected.basis(kind)
        bases[kind] = Basis(basis.U.float().cpu(), basis.V.float().cpu())
        del collected.moments[kind], basis
        report[kind] = {"seconds": time.perf_counter() - started, "gradients": facts["gradients"][kind]}
    save_bases(path, bases, facts | {"content": "bases"})
    records.write_json(path.with_suffix(".json"), {TASK: report})


def train_cell(config: Mapping[str, Any], seeds: Sequence[int], folder: Path, merged: Path) -> None:
    """All seeds of a cell: records and ``cell.json`` in one folder, merged models in another, ``seed<seed>`` each.

    Raises:
        ValueError: if any run failed (after all others are done).
    """
    set_threads(config)
    inputs, listed, failed = ChatInputs(config), [], []
    for seed in tqdm(seeds, desc="seeds", disable=not config["progress"]):
        record, path = _run_or_reuse(inputs, seed, folder, merged / f"seed{seed}")
        listed.append(path.name)
        if record["status"] != "finished":
            failed.append(f"{path.name}: {record['error']}")
    if is_first_process():
        keep_only(folder, listed)
        records.write_json(folder / "cell.json", {"records": listed})
    if failed:
        raise ValueError(f"{len(failed)} of {len(listed)} runs failed; " + "; ".join(failed))


def run_one(config: Mapping[str, Any]) -> float:
    """A run by hand; record and merged model land under ``output``. Returns its validation loss.

    Raises:
        ValueError: if the run fails.
    """
    set_threads(config)
    place = Path(config["output"]) / config["model"]["name"] / config["method"]["name"]
    record, path = _run_or_reuse(ChatInputs(config), config["seed"], place, place / f"seed{config['seed']}")
    if record["status"] != "finished":
        raise ValueError(f"{path}: {record['error']}")
    log.info("validation loss %.4f (before: %.4f)  %s", record["score"], record["baseline"]["loss"], path)
    return record["score"]


def _run_or_reuse(inputs: ChatInputs, seed: int, folder: Path, merged: Path) -> tuple[dict[str, Any], Path]:
    """A finished record is reused if the merged model is still there and of the same run."""
    digest = records.config_hash(identity(inputs, seed))
    path = records.find_finished(folder, digest)
    marker = merged / MERGED
    if path is not None and marker.is_file() and records.read_json(marker)["config_hash"] == digest:
        log.info("%s is finished, reused", path)
        return records.read_json(path), path
    record = chat_run(inputs, seed, merged)
    path = folder / f"{TASK}-seed{seed}-{digest}.json"
    if is_first_process():
        records.write_json(path, record)
    return record, path
