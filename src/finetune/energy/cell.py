"""The energy stage of one model: every task and trajectory of an experiment, a record and a file of heat maps each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finetune.energy.measures import MeasureOptions
from finetune.energy.probe import Probe
from finetune.energy.spaces import SPACES
from finetune.energy.trajectory import Looks, follow
from finetune.methods import build_method, deciding
from finetune.runs.choices import for_task
from finetune.runs.glue import GlueProblem
from finetune.store import records
from finetune.store.files import sha256
from finetune.training import memory
from finetune.training.evaluation import evaluate
from finetune.training.options import TrainingOptions
from finetune.training.processes import make_accelerator
from sparsegrad import save_tensors

log = logging.getLogger(__name__)


def energy_cell(config: Mapping[str, Any], tasks: Sequence[str], folder: Path) -> None:
    """Follow every trajectory of every task: ``<task>-<trajectory>.json`` and ``.safetensors``. What is finished stays.

    Args:
        config: composed from ``conf/energy.yaml``; ``basis`` is the basis stage's folder or file.
        tasks: names.
        folder: for the files; those of other tasks and trajectories are deleted.

    Raises:
        ValueError: on bad configuration or data, without bases, or if a run diverges.
    """
    if config["basis"] is None:
        raise ValueError("the energy stage needs bases: run the gradients and basis stages, then set basis=FOLDER.")
    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
    inputs = GlueProblem(config)
    wanted = [(task, name) for task in tasks for name in config["scale"]["trajectories"]]
    for task, name in tqdm(wanted, desc="trajectories", disable=not config["progress"]):
        path = folder / f"{task}-{name}.json"
        content = identity(inputs, task, name)
        digest = records.config_hash(content)
        record, file = records.reusable(path, digest), path.with_suffix(".safetensors")
        if record and file.is_file() and record.get("maps_sha256") in (None, sha256(file)):  # None: records without it
            log.info("%s is finished, reused", path)
            continue
        looks, facts = _follow(inputs, task, name)
        maps = {"content": "gradient maps", "config_hash": digest, "largest": "1; each map is relative to its own"}
        save_tensors(file, looks.pictures, maps)
        facts["maps_sha256"] = sha256(file)
        records.write_record(path, _record(config, task, name, content, looks, facts))
    names = {f"{task}-{name}" for task, name in wanted}
    for path in [*folder.glob("*.json"), *folder.glob("*.safetensors")]:
        if path.stem not in names:
            path.unlink()


def identity(inputs: GlueProblem, task: str, trajectory: str) -> dict[str, Any]:
    """Everything that decides a trajectory's numbers; paths, device and logging are left out."""
    config = inputs.config
    model = {name: config["model"][name] for name in ("name", "target_modules", "layers_to_transform", "k")}
    return {
        "version": config["version"],
        "kind": "energy",
        "model": model | inputs.contents,
        "method": deciding(_method_group(config, trajectory)),
        "protocol": {name: config["protocol"][name] for name in _CHOICES},
        "basis": {"scope": "task", "sha256": inputs.bases(task)[1]["sha256"]},
        "scale": {name: for_task(config["scale"][name], task) for name in _SIZES},
        "measure": dict(config["measure"]),
        "task": {"name": task, "metric": inputs.metric(task)},
        "data": {role: split.content for role, split in inputs.splits(task).items()},
        "seed": config["seed"],
    }


# What of conf/protocol and of conf/scale/energy decides numbers.
_CHOICES = (
    *("name", "density", "orientation", "train", "frozen", "padding", "max_length", "precision", "preliminary"),
    *("weight_decay", "max_grad_norm", "schedule", "search_seed"),
)
_SIZES = (
    *("train_examples", "steps", "batches", "refresh_batches", "batch_size", "learning_rate"),
    *("accumulation_steps", "precision", "picture"),
)


def _follow(inputs: GlueProblem, task: str, name: str) -> tuple[Looks, dict[str, Any]]:
    """Run one trajectory; returns its looks and the facts of its record."""
    config, scale, protocol = inputs.config, inputs.config["scale"], inputs.config["protocol"]
    facts, splits = inputs.facts(task), inputs.splits(task)
    options = _training_options(config, task)
    accelerator = make_accelerator(config["device"], options.precision)
    device, seed = accelerator.device, config["seed"]
    model = inputs.load_model(task, seed).to(device)
    stored, _ = inputs.bases(task)
    stored = {kind: basis.to(device) for kind, basis in stored.items()}
    method = build_method(
        _method_group(config, name),
        config["model"],
        protocol,
        bases=inputs.bases(task)[0],
        one_backward_a_step=scale["accumulation_steps"] == 1,
        device=device.type,
    )
    judged, refreshing = _rows(config, len(splits["train"]))
    probe = Probe(
        method=method,
        split=splits["train"],
        judged=judged,
        refreshing=refreshing,
        stored=stored,
        options=MeasureOptions(**config["measure"]),
        budget=(config["model"]["k"], protocol["density"]),
        batch_size=scale["batch_size"],
        refresh_batches=_refresh_batches(config),
        seed=seed,
        picture=tuple(scale["picture"]),
    )
    model = method.prepare(model)
    optimizer = method.optimizer(model, options.learning_rate, options.weight_decay)
    looks = follow(
        model,
        optimizer,
        probe,
        for_task(scale["steps"], task),
        options,
        accelerator,
        score=lambda m: evaluate(m, splits["validation"], facts, scale["evaluation_batch_size"], device)[facts.metric],
        label=f"{task} {name}" if config["progress"] else "",
    )
    targets = method.targets.find(model)
    layers = [
        {"kind": t.kind, "layer": t.layer, "name": t.name, "shape": list(t.shape), "block": list(probe.ranks(t.shape))}
        for t in targets
    ]
    return looks, {
        "metric": facts.metric,
        "title": facts.title,
        "device": memory.device_name(device),
        "layers": layers,
        "options": asdict(options),
        "judged_examples": sum(len(rows) for rows in judged),
    }


def _record(
    config: Mapping[str, Any], task: str, name: str, content: Mapping[str, Any], looks: Looks, facts: Mapping[str, Any]
) -> dict[str, Any]:
    run = {
        "experiment": config["name"],
        "kind": "energy",
        "model": config["model"]["name"],
        "trajectory": name,
        "task": task,
        "protocol": config["protocol"]["name"],
        "scale": config["scale"]["name"],
        "seed": config["seed"],
        "config_hash": records.config_hash(content),
    }
    return {
        "schema": records.SCHEMA,
        "version": config["version"],
        "run": run,
        "identity": content,
        "titles": {"model": config["model"]["title"], "task": facts["title"]},
        "random_weights": config["model"]["random_weights"],
        "metric": facts["metric"],
        "device": facts["device"],
        "training": facts["options"],
        "padding": config["protocol"]["padding"],
        "spaces": list(SPACES),
        "measure": dict(config["measure"]) | {"judged_examples": facts["judged_examples"]},
        "refresh_batches": _refresh_batches(config),
        "layers": facts["layers"],
        "maps_sha256": facts["maps_sha256"],
        "steps": looks.steps,
        "nonzero_percent_of_training_steps": looks.nonzero,
        "provenance": records.provenance(),
    }


def _method_group(config: Mapping[str, Any], trajectory: str) -> Mapping[str, Any]:
    """The ``method`` group of a trajectory, one of those that ``conf/energy.yaml`` composes."""
    if trajectory not in config["methods"]:
        raise ValueError(f"scale.trajectories names {trajectory!r}; allowed: {', '.join(config['methods'])}.")
    return config["methods"][trajectory]


def _training_options(config: Mapping[str, Any], task: str) -> TrainingOptions:
    """The protocol's, without evaluation: a run of these goes to its last step."""
    protocol, scale = config["protocol"], config["scale"]
    last = max(1, for_task(scale["steps"], task)[-1])
    return TrainingOptions(
        learning_rate=scale["learning_rate"],
        batch_size=scale["batch_size"],
        epochs=last,  # the steps end it
        max_steps=last,
        evaluation_steps=last,
        evaluation_batch_size=scale["evaluation_batch_size"],
        seed=config["seed"],
        accumulation_steps=scale["accumulation_steps"],
        weight_decay=protocol["weight_decay"],
        schedule=protocol["schedule"],
        max_grad_norm=protocol["max_grad_norm"],
        precision=scale["precision"] or protocol["precision"],
    )


def _refresh_batches(config: Mapping[str, Any]) -> int:
    """As many as the stored basis was made from, unless the scale says otherwise: the two differ in age alone."""
    return config["scale"]["refresh_batches"] or config["protocol"]["preliminary"]["steps"]


def _rows(config: Mapping[str, Any], examples: int) -> tuple[list[list[int]], list[int]]:
    """Judged batches, and rows of the refreshed bases: apart from each other and from those of the stored basis."""
    scale, preliminary = config["scale"], config["protocol"]["preliminary"]
    size, count = scale["batch_size"], scale["batches"]
    used = torch.randperm(examples, generator=torch.Generator().manual_seed(config["protocol"]["search_seed"]))
    stored = set(used[: preliminary["steps"] * preliminary["batch_size"]].tolist())
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(config["seed"])).tolist()
    free = [row for row in order if row not in stored]
    wanted = count * size
    if len(free) < wanted + size:
        raise ValueError(
            f"{examples} training rows; the stored basis took {len(stored)}, {wanted} are to be judged and at least "
            f"{size} are for the refreshed basis: lower scale.batches or protocol.preliminary.steps."
        )
    judged = [free[start : start + size] for start in range(0, wanted, size)]
    return judged, free[wanted : wanted + size * _refresh_batches(config)]
