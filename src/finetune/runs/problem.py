"""A problem: what a run needs of its data and its model, whatever they are. GLUE and dialogues are two of them.

:mod:`finetune.runs.run` trains on one, :mod:`finetune.runs.cells` loops over its tasks and seeds.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from finetune import models
from finetune.data.examples import content_of
from finetune.data.tokenised import load_split
from finetune.methods import Method, build_targets, deciding, needs_bases, with_own_choices
from finetune.runs.choices import check_point, for_method, for_task
from finetune.store import records
from finetune.training import gradients
from finetune.training.evaluation import Evaluation, report_half
from finetune.training.options import TrainingOptions
from sparsegrad import Basis, load_bases

# What of a model's file decides no number: the content of what lies there does.
_PLACES = ("checkpoint", "folder", "files", "title", "checksums", "tokenizer")


@dataclass(frozen=True)
class Run:
    """One run of a problem.

    Attributes:
        task: name.
        seed: of data order, dropout and all weights that are drawn.
        hyperparameters: ``learning_rate``, ``batch_size``; of a trial of a search ``max_steps`` too.
        search: whether it is a trial of a search, which has a length of its own.
    """

    task: str
    seed: int
    hyperparameters: Mapping[str, Any]
    search: bool = False


class Problem(ABC):
    """Data, model and measure of one configuration; what several runs share is loaded once.

    It travels to another process as its configuration, and is loaded there once. What several problems share
    (tokenizer, tokenised data, bases) is loaded once where they are given the same ``loads``.

    Attributes:
        kind: of its records.
        group: of the configuration that names its data, with their ``root``.
        lists: of an experiment file: the names of those with the seeds and, if there is more than one, the tasks.
        sizes: what of the group ``scale`` decides numbers; the rest (time between checkpoints) does not.
        no_choices: what of the group ``protocol`` decides none, or stands in a run's hyper-parameters.
        baseline: whether the starting model is measured too.
        keeps_models: whether the merged model of a finished run is kept.
        stored_dtype: of a merged model's weights.
        config: the composed configuration as plain dictionaries; a variant's own choices are put into its protocol.
    """

    kind: ClassVar[str]
    group: ClassVar[str]
    lists: ClassVar[tuple[str, ...]]
    sizes: ClassVar[tuple[str, ...]]
    no_choices: ClassVar[tuple[str, ...]]
    baseline: ClassVar[bool] = False
    keeps_models: ClassVar[bool] = False

    def __init__(self, config: Mapping[str, Any], loads: dict[str, Any] | None = None) -> None:
        self.config = with_own_choices(config)
        self.stored_dtype = torch.float32
        self._loads = {} if loads is None else loads
        self._bases: dict[str, tuple[dict[str, Basis], dict[str, Any]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded_once, (type(self), json.dumps(self.config | {"progress": False}))

    @property
    @abstractmethod
    def task(self) -> str:
        """The task of a run by hand."""

    @property
    @abstractmethod
    def gradients_seed(self) -> int:
        """Seed of the preliminary phase that all seeds of a cell share."""

    @abstractmethod
    def splits(self, task: str) -> dict[str, Any]:
        """``train`` and ``validation``, :class:`finetune.data.examples.Examples`; ValueError on bad data."""

    @abstractmethod
    def metric(self, task: str) -> str:
        """Which of the evaluation's numbers is the score."""

    @abstractmethod
    def evaluator(
        self, task: str, options: TrainingOptions, accelerator: Accelerator
    ) -> Callable[[nn.Module], Evaluation]:
        """A function from a model to loss, metrics and predictions on the validation split."""

    @abstractmethod
    def load_model(self, task: str, seed: int) -> nn.Module:
        """The starting model, on the CPU; ValueError if there is none, or the data don't fit it."""

    @abstractmethod
    def prepare(self, method: Method, model: nn.Module, device: torch.device, seed: int) -> nn.Module:
        """The model as the method trains it, on the device."""

    @abstractmethod
    def options(self, run: Run, processes: int) -> TrainingOptions:
        """How a run trains on so many processes."""

    def made_for(self, task: str) -> dict[str, Any]:
        """What gradients and bases are made for: written into their files, checked when they are read."""
        protocol = self.config["protocol"]
        targets = build_targets("sparsegrad", self.config["model"], protocol)
        return {
            "version": self.config["version"],
            "model": self.config["model"]["name"],
            **{f"model_{name}": value for name, value in self.contents.items()},
            "targets": {"modules": dict(targets.target_modules), "layers": targets.layers_to_transform},
            "task": task,
            "data": self.splits(task)["train"].content,
            **{name: protocol.get(name) for name in ("preliminary", "hosvd", "shared_input")},
        }

    def identity(self, run: Run) -> dict[str, Any]:
        """Everything that decides a run's numbers, and nothing else: no path, no device. Its hash names the record.

        Files count by their content: weights and configuration of the model, bases, and the data as the tokenizer gives
        them to the model.
        """
        config = self.config
        model = {name: value for name, value in config["model"].items() if name not in _PLACES}
        return {
            "version": config["version"],
            "kind": "search" if run.search else self.kind,
            "model": model | self.contents,
            "method": deciding(config["method"]),
            "protocol": {k: v for k, v in config["protocol"].items() if k not in self.no_choices},
            "scale": {name: for_task(config["scale"][name], run.task) for name in self.sizes},
            "basis": self._basis_identity(run.task),
            "task": {"name": run.task, "metric": self.metric(run.task)},
            "data": {role: split.content for role, split in self.splits(run.task).items()},
            "hyperparameters": dict(run.hyperparameters),
            "seed": run.seed,
            **self.selection,
        }

    def _basis_identity(self, task: str) -> dict[str, Any] | None:
        scope = self.basis_scope
        if scope is None:
            return None
        return {"scope": scope} | ({"sha256": self.bases(task)[1]["sha256"]} if scope == "task" else {})

    def treatment(self, task: str) -> dict[str, Any]:
        """What all methods share, for the record, beside the options of every training."""
        return {}

    def data_facts(self, task: str) -> dict[str, Any]:
        """More on the data, for the record."""
        return {"score_split": "validation"} | self.selection

    def kept_facts(self) -> dict[str, Any]:
        """What a reader of the merged model needs, beside the run's hash."""
        return {}

    @property
    def selection(self) -> dict[str, str]:
        """``selection`` where a part of the validation rows alone selects, for identity and record."""
        chosen = self.config["scale"].get("selection")
        return {} if chosen is None else {"selection": chosen}

    def report_rows(self, rows: int) -> np.ndarray | None:
        """Which of so many validation rows report, and don't select; None: all do both."""
        return report_half(rows) if self.selection else None

    @property
    def root(self) -> str:
        """Folder of models and data."""
        return self.config[self.group]["root"]

    @property
    def place(self) -> Path:
        """Where the files of this model and method lie, in each folder of results."""
        return Path(self.config["model"]["name"]) / self.config["method"]["name"]

    @property
    def precision(self) -> str:
        """Of the computation: ``fp32`` or ``bf16``."""
        return self.config["scale"]["precision"] or self.config["protocol"]["precision"]

    @cached_property
    def contents(self) -> dict[str, str]:
        """Identity of the starting model: of its weights (``sha256``) and of its configuration."""
        return self._once("contents", lambda: models.contents(self.config["model"], self.root))

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._once("tokenizer", lambda: models.load_tokenizer(self.config["model"], self.root))

    def _once(self, what: str, load: Callable[[], Any], **deciding: Any) -> Any:
        """What is loaded, or what another problem of the same model and data has loaded.

        Args:
            what: to call it by.
            load: loads it.
            deciding: JSON values that decide it, beside the groups of the model and of the data.
        """
        groups = [self.config["model"], self.config[self.group], deciding]
        key = f"{what} {json.dumps(groups, sort_keys=True)}"
        if key not in self._loads:
            self._loads[key] = load()
        return self._loads[key]

    def carried_splits(self, task: str) -> dict[str, Any] | None:
        """The tokenised splits that travelled with a configuration; None of one that reads its data itself."""
        carried = self.config.get("carried")
        if carried is None:
            return None
        files = carried["splits"][task]
        return self._once(
            "carried", lambda: {role: load_split(Path(name)) for role, name in files.items()}, files=files
        )

    def carried_facts(self) -> dict[str, Any]:
        """What travels beside tokenised data, because it decides numbers and needs what a bare machine lacks."""
        return {}

    @property
    def searches(self) -> bool:
        """Whether hyper-parameters are searched: where protocol and scale say how, and they aren't given by hand."""
        given = (self.config["learning_rate"], self.config["batch_size"])
        sizes = self.config["scale"].get("search")
        return "search" in self.config["protocol"] and sizes is not None and None in given

    def digest(self, run: Run) -> str:
        """Hash of a run's identity."""
        return records.config_hash(self.identity(run))

    def checkpoints(self, run: Run) -> Path:
        """Folder of a run's checkpoints: of this run alone."""
        return Path(self.config["checkpoints"]) / self.digest(run)

    def hyperparameters(self, best: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Learning rate and batch size: given by hand, else the search's best, the scale's, or the protocol's.

        Each may be one value, or a mapping from methods to values; a variant that it leaves out takes its base's.

        Raises:
            ValueError: if a mapping leaves the method out, or one is none in range.
        """
        config, found = self.config, {}
        places = (config, best or {}, config["scale"], config["protocol"])
        for name in ("learning_rate", "batch_size"):
            value = next((place[name] for place in places if place.get(name) is not None), None)
            found[name] = for_method(value, config["method"], name)
        check_point(found)  # a search's record, or nothing, may stand behind it
        return found

    @property
    def basis_scope(self) -> str | None:
        """Where a method's bases come from: ``task`` (a file of the basis stage) or ``run`` (collected in the run)."""
        if not needs_bases(self.config["method"]):
            return None
        return "run" if self.config["basis"] is None else self.config["protocol"]["preliminary"]["scope"]

    def bases(self, task: str) -> tuple[dict[str, Basis], dict[str, Any]]:
        """Bases from ``basis``, a file or a folder of ``<task>.safetensors``, and the facts that lie in it.

        To the facts comes ``sha256``, of the bases themselves.

        Raises:
            ValueError: if they are missing, damaged, or of another checkpoint, data or preliminary phase.
        """
        if task not in self._bases:
            path = Path(self.config["basis"])
            path = path / f"{task}.safetensors" if path.is_dir() else path
            bases, facts = self._once("bases", lambda: _read_bases(path), path=str(path))
            for name, value in self.made_for(task).items():
                if facts.get(name) != value:
                    raise ValueError(
                        f"{path} was made with {name}={facts.get(name)}, this run has {name}={value}: "
                        f"run the gradients and basis stages for model={self.config['model']['name']}."
                    )
            self._bases[task] = bases, facts
        return self._bases[task]

    def checked(self, model: Any, task: str) -> nn.Module:
        """The model, if it has positions and embeddings for the data; else an error, before torch has one of its own.

        Raises:
            ValueError: if the longest row of a split is longer than the model takes, or a token is not the model's.
        """
        splits, rows = self.splits(task).values(), model.get_input_embeddings().num_embeddings
        largest = max(split.largest_id for split in splits)
        if largest >= rows:
            raise ValueError(f"token {largest} of the data, but the model embeds {rows}: tokenizer and model differ.")
        longest, limit = max(split.longest for split in splits), models.positions(model)
        if limit is not None and longest > limit:
            raise ValueError(
                f"inputs of {longest} tokens; this model has {limit} positions: "
                f"set protocol.max_length={limit} or less."
            )
        return model

    def gradient_model(self, task: str, seed: int) -> nn.Module:
        """The starting model as the preliminary phase needs it."""
        return self.load_model(task, seed)

    def collect(self, model: nn.Module, task: str, seed: int, device: torch.device) -> gradients.Collected:
        """The preliminary phase: moments of the gradients of SparseGrad's target matrices."""
        protocol = self.config["protocol"]
        group, targets = protocol["preliminary"], build_targets("sparsegrad", self.config["model"], protocol)
        chosen = {name: group[name] for name in ("steps", "batch_size", "update", "learning_rate")}
        options = gradients.PreliminaryOptions(**chosen, backend=protocol["hosvd"])
        collected = gradients.collect(
            model,
            self.splits(task)["train"],
            targets,
            options,
            seed=seed,
            device=device,
            keep_weights=group["keep_weights"],
            progress_bar=self.config["progress"],
        )
        shared = [kind for kind in protocol.get("shared_input", ()) if kind in targets.target_modules]
        if len(shared) > 1:
            collected.share_input(shared)
        return collected

    def _options(self, run: Run, **own: Any) -> TrainingOptions:
        """Options that all problems take from the same places."""
        protocol, scale = self.config["protocol"], self.config["scale"]
        return TrainingOptions(
            learning_rate=run.hyperparameters["learning_rate"],
            batch_size=run.hyperparameters["batch_size"],
            epochs=scale["epochs"] or protocol["epochs"],
            max_steps=run.hyperparameters.get("max_steps") or for_task(scale["max_steps"], run.task),
            seed=run.seed,
            evaluation_batch_size=scale["evaluation_batch_size"],
            precision=self.precision,
            checkpoint_seconds=scale["checkpoint_seconds"],
            graphs=self.config["training"]["graphs"],
            **{name: protocol[name] for name in ("patience", "weight_decay", "schedule", "max_grad_norm")},
            **own,
        )


def _read_bases(path: Path) -> tuple[dict[str, Basis], dict[str, Any]]:
    bases, facts = load_bases(path)
    content = [(kind.encode(), bases[kind].U, bases[kind].V) for kind in sorted(bases)]
    return bases, facts | {"sha256": content_of(*chain.from_iterable(content))}


@cache
def _loaded_once(problem: type[Problem], config: str) -> Problem:
    return problem(json.loads(config), _loads_of_process())


@cache
def _loads_of_process() -> dict[str, Any]:
    return {}
