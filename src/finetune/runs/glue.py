"""One run: from a configuration to a record. The stages and the search call this and nothing deeper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune import models
from finetune.data.glue import Split, Task, load_task
from finetune.methods import Method, Targets, build_method, deciding, needs_bases, with_own_choices
from finetune.methods.base import count_parameters
from finetune.runs import record_content
from finetune.runs.execution import check_length, execute, read_bases
from finetune.store import records
from finetune.training import memory
from finetune.training.evaluation import evaluate
from finetune.training.gradients import Collected, PreliminaryOptions, collect
from finetune.training.loop import make_accelerator
from finetune.training.options import TrainingOptions, planned_steps
from finetune.training.refreshing import refresh_options
from sparsegrad import Basis


@dataclass
class Inputs:
    """What several runs of a cell share, loaded once: tokenised tasks, bases, the checkpoint's fingerprint.

    Attributes:
        config: the composed configuration as plain dictionaries; a variant's own choices are put into its protocol.
    """

    config: Mapping[str, Any]
    _tasks: dict[str, tuple[Task, dict[str, Split]]] = field(default_factory=dict)
    _bases: dict[str, tuple[dict[str, Basis], dict[str, Any]]] = field(default_factory=dict)
    _fingerprint: str | None = None

    def __post_init__(self) -> None:
        self.config = with_own_choices(self.config)

    @property
    def fingerprint(self) -> str:
        """Identity of the starting weights."""
        if self._fingerprint is None:
            self._fingerprint = models.fingerprint(self.config["model"], self.config["data"]["root"])
        return self._fingerprint

    def task(self, name: str) -> tuple[Task, dict[str, Split]]:
        """A task and its tokenised splits."""
        if name not in self._tasks:
            config, protocol = self.config, self.config["protocol"]
            tokenizer = models.load_tokenizer(config["model"], config["data"]["root"])
            self._tasks[name] = load_task(
                dict(config["data"]) | {"task": name},
                tokenizer,
                max_length=protocol["max_length"],
                padding=protocol["padding"],
                limit=config["scale"]["train_examples"],
            )
        return self._tasks[name]

    def bases(self, task: str) -> tuple[dict[str, Basis], dict[str, Any]]:
        """Bases of a task from ``basis``, a file or a folder of ``<task>.safetensors``.

        Raises:
            ValueError: if they are missing, damaged, or of another checkpoint, task or preliminary phase.
        """
        if task not in self._bases:
            path = Path(self.config["basis"])
            path = path / f"{task}.safetensors" if path.is_dir() else path
            preliminary = dict(self.config["protocol"]["preliminary"])
            expected = {"model_sha256": self.fingerprint, "task": task, "preliminary": preliminary}
            self._bases[task] = read_bases(path, expected, self.config["model"]["name"])
        return self._bases[task]


def identity(inputs: Inputs, task: str, seed: int, hyperparameters: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Everything that decides a run's numbers; its hash names the record. Paths, device and logging are left out."""
    config = inputs.config
    facts, splits = inputs.task(task)
    sizes = [name for name in _SIZES if not (kind == "search" and name == "max_steps")]  # a search has its own
    places = ("checkpoint", "folder", "files", "title", "checksums", "tokenizer")
    model = {k: v for k, v in config["model"].items() if k not in places}
    return {
        "version": config["version"],
        "kind": kind,
        "model": model | {"sha256": inputs.fingerprint},
        "method": deciding(config["method"]),
        "protocol": {k: v for k, v in config["protocol"].items() if k not in ("search", "sources")},
        "scale": {name: for_task(config["scale"][name], task) for name in sizes},
        "basis": _basis_scope(config),
        "task": {"name": task, "metric": facts.metric, "columns": list(facts.columns), "num_labels": facts.num_labels},
        "data_sha256": {role: split.sha256 for role, split in splits.items()},
        "hyperparameters": dict(hyperparameters),
        "seed": seed,
    }


# What of conf/scale decides numbers; the rest (batch of evaluation, time between checkpoints) does not.
_SIZES = ("train_examples", "epochs", "max_steps", "evaluation_steps", "accumulation_steps", "precision")


def for_task(value: Any, task: str) -> Any:
    """A value of ``conf/scale`` that may be one for all tasks, or a mapping from tasks, with ``default``, to values."""
    return value.get(task, value["default"]) if isinstance(value, Mapping) else value


def _basis_scope(config: Mapping[str, Any]) -> str | None:
    """Where SparseGrad's bases come from: ``task`` (a file of the basis stage) or ``run`` (collected in the run)."""
    if not needs_bases(config["method"]):
        return None
    return "run" if config["basis"] is None else config["protocol"]["preliminary"]["scope"]


def training_options(
    config: Mapping[str, Any], task: str, seed: int, hyperparameters: Mapping[str, Any]
) -> TrainingOptions:
    """Options of one run; the protocol's evaluation interval holds at batch 16 and is scaled by 16 / batch."""
    protocol, scale = config["protocol"], config["scale"]
    batch_size = hyperparameters["batch_size"]
    interval = for_task(scale["evaluation_steps"], task)
    if interval is None:
        at_16 = protocol["evaluation_steps"].get(task, 100)
        interval = max(1, round(at_16 * 16 / batch_size))
    return TrainingOptions(
        learning_rate=hyperparameters["learning_rate"],
        batch_size=batch_size,
        epochs=scale["epochs"] or protocol["epochs"],
        max_steps=hyperparameters.get("max_steps") or for_task(scale["max_steps"], task),
        evaluation_steps=interval,
        seed=seed,
        accumulation_steps=scale["accumulation_steps"],
        evaluation_batch_size=scale["evaluation_batch_size"],
        patience=protocol["patience"],
        weight_decay=protocol["weight_decay"],
        schedule=protocol["schedule"],
        max_grad_norm=protocol["max_grad_norm"],
        precision=scale["precision"] or protocol["precision"],
        checkpoint_seconds=scale["checkpoint_seconds"],
    )


def train_run(
    inputs: Inputs,
    task: str,
    seed: int,
    hyperparameters: Mapping[str, Any],
    *,
    kind: str = "train",
    on_evaluation: Callable[[int, float], None] | None = None,
    save_model: Path | None = None,
) -> dict[str, Any]:
    """Prepare, train and evaluate one model.

    Args:
        inputs: shared inputs of the cell.
        task: name of a task.
        seed: of head, data order and dropout.
        hyperparameters: ``learning_rate``, ``batch_size``, optionally ``max_steps``.
        kind: ``train`` or ``search``.
        on_evaluation: see :func:`finetune.training.loop.train`.
        save_model: folder for the merged, plain model with the best weights; None saves none.

    Returns:
        The record. A run whose loss is not finite gives one with status ``failed``.

    Raises:
        ValueError: on bad configuration or data.
    """
    config = inputs.config
    facts, splits = inputs.task(task)
    digest = records.config_hash(identity(inputs, task, seed, hyperparameters, kind))
    options = training_options(config, task, seed, hyperparameters)
    warmup = round(config["protocol"]["warmup_ratio"] * planned_steps(len(splits["train"]), options))
    options = replace(options, warmup_steps=warmup)
    accelerator = make_accelerator(config["device"], options.precision)
    device = accelerator.device
    model = models.load_classifier(config["model"], config["data"]["root"], facts.num_labels, seed).to(device)
    check_length(model, splits.values())
    basis_facts: dict[str, Any] = {}
    method = _method(inputs, model, splits["train"], task, seed, options, accelerator, basis_facts)
    parameters = count_parameters(model, method)
    model = method.prepare(model)
    optimizer = method.optimizer(model, options.learning_rate, options.weight_decay)
    record = record_content.header(
        config, inputs.fingerprint, splits, facts.validation, task, seed, hyperparameters, kind, digest
    ) | {
        "treatment": record_content.treatment(options, config, parameters["wrapped_layers"]),
        "parameters": parameters,
        "basis": basis_facts,
        "device": memory.device_name(device),
    }
    torch.manual_seed(seed)
    return execute(
        config,
        record,
        model,
        optimizer,
        splits["train"],
        lambda m: evaluate(m, splits["validation"], facts, options.evaluation_batch_size, device),
        facts.metric,
        options,
        accelerator,
        on_evaluation=on_evaluation,
        on_finished=None if save_model is None else lambda m: method.merge(m).save_pretrained(save_model),
        refresh=refresh_options(config["method"]),
    )


def targets_of(config: Mapping[str, Any]) -> Targets:
    """The target matrices of a configuration."""
    return Targets(dict(config["model"]["target_modules"]), config["model"]["layers_to_transform"])


def preliminary_options(config: Mapping[str, Any]) -> PreliminaryOptions:
    """Options of the gradient collection."""
    group = config["protocol"]["preliminary"]
    return PreliminaryOptions(
        steps=group["steps"],
        batch_size=group["batch_size"],
        update=group["update"],
        learning_rate=group["learning_rate"],
        backend=config["protocol"]["hosvd"],
    )


def _method(
    inputs: Inputs,
    model: nn.Module,
    split: Split,
    task: str,
    seed: int,
    options: TrainingOptions,
    accelerator: Any,
    facts: dict[str, Any],
) -> Method:
    """The configured method; SparseGrad gets its bases from the file, or collects them here."""
    config = inputs.config
    bases = None
    if needs_bases(config["method"]):
        if _basis_scope(config) == "task":
            bases, found = inputs.bases(task)
        else:
            collected = collect_for_run(inputs, model, split, seed, accelerator.device)
            bases, found = collected.bases(), collected.facts
        facts.update({name: value for name, value in found.items() if name != "content"})
    one_backward = options.accumulation_steps == 1 and accelerator.num_processes == 1
    return build_method(
        config["method"], config["model"], config["protocol"], bases=bases, one_backward_a_step=one_backward
    )


def collect_for_run(inputs: Inputs, model: nn.Module, split: Split, seed: int, device: torch.device) -> Collected:
    """Gradient collection inside a run (``protocol.preliminary.scope=run``, or no basis file given)."""
    config = inputs.config
    check_length(model, [split])
    return collect(
        model,
        split,
        targets_of(config),
        preliminary_options(config),
        seed=seed,
        device=device,
        keep_weights=config["protocol"]["preliminary"]["keep_weights"],
        progress_bar=config["progress"],
    )
