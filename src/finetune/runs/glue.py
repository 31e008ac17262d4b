"""GLUE: an encoder with a new head, fine-tuned on one task; the score is the task's metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from finetune import models
from finetune.data.glue import Split, Task, load_task
from finetune.methods import Method
from finetune.runs.choices import for_task
from finetune.runs.problem import Problem, Run
from finetune.training.capture import Graphs
from finetune.training.evaluation import Evaluation, evaluate
from finetune.training.options import TrainingOptions, planned_steps
from finetune.training.steps import graphs_mode


class GlueProblem(Problem):
    """A configuration of ``conf/glue.yaml``."""

    kind, group, lists = "train", "data", ("tasks", "seeds")
    sizes = ("train_examples", "epochs", "max_steps", "evaluation_steps", "accumulation_steps", "precision")
    no_choices = ("sources", "search")

    @property
    def task(self) -> str:
        return self.config["data"]["task"]

    @property
    def gradients_seed(self) -> int:
        return self.config["protocol"]["search_seed"]

    def facts(self, task: str) -> Task:
        """What ``conf/data`` says of a task."""
        return self._load(task)[0]

    def splits(self, task: str) -> dict[str, Split]:
        return self._load(task)[1]

    def _load(self, task: str) -> tuple[Task, dict[str, Split]]:
        protocol, limit = self.config["protocol"], self.config["scale"]["train_examples"]
        how = {"max_length": protocol["max_length"], "padding": protocol["padding"], "limit": limit}
        data = dict(self.config["data"]) | {"task": task}
        if (carried := self.carried_splits(task)) is not None:
            return Task.from_config(data), carried
        return self._once("task", lambda: load_task(data, self.tokenizer, **how), task=task, **how)

    def metric(self, task: str) -> str:
        return self.facts(task).metric

    def evaluator(
        self, task: str, options: TrainingOptions, accelerator: Accelerator
    ) -> Callable[[nn.Module], Evaluation]:
        split, facts = self.splits(task)["validation"], self.facts(task)
        graphs = Graphs(accelerator.device, graphs_mode(options, accelerator))
        size, device, report = options.evaluation_batch_size, accelerator.device, self.report_rows(len(split))
        return lambda model: evaluate(model, split, facts, size, device, graphs, report)

    def load_model(self, task: str, seed: int) -> nn.Module:
        facts, splits = self._load(task)
        padding = splits["train"].pad_token_id
        model = models.load_classifier(self.config["model"], self.root, facts.num_labels, seed, padding)
        return self.checked(model, task)

    def prepare(self, method: Method, model: nn.Module, device: torch.device, seed: int) -> nn.Module:
        return method.prepare(model.to(device))

    def options(self, run: Run, processes: int) -> TrainingOptions:
        protocol, scale = self.config["protocol"], self.config["scale"]
        interval = for_task(scale["evaluation_steps"], run.task)
        if interval is None:  # the protocol's holds at batch 16
            at_16 = protocol["evaluation_steps"].get(run.task, 100)
            interval = max(1, round(at_16 * 16 / run.hyperparameters["batch_size"]))
        own = {"evaluation_steps": interval, "accumulation_steps": scale["accumulation_steps"]}
        options = self._options(run, **own)
        warmup = round(protocol["warmup_ratio"] * planned_steps(len(self.splits(run.task)["train"]), options))
        return replace(options, warmup_steps=warmup)

    def made_for(self, task: str) -> dict[str, Any]:
        return super().made_for(task) | {"seed": self.gradients_seed}  # of dialogues it is a run's own, where by hand

    def identity(self, run: Run) -> dict[str, Any]:
        found = super().identity(run)
        found["task"] |= {"num_labels": self.facts(run.task).num_labels}
        if run.search:  # it has its own length, and what it tries is its own; more trials go on with those there are
            sizes = self.config["scale"]["search"]
            del found["scale"]["max_steps"]
            found["search"] = self.config["protocol"]["search"] | {k: sizes[k] for k in ("points", "pruning")}
        return found

    def treatment(self, task: str) -> dict[str, Any]:
        return {
            "padding": self.config["protocol"]["padding"],
            "search_trials": self.config["scale"]["search"]["trials"] if self.searches else None,
        }

    def data_facts(self, task: str) -> dict[str, Any]:
        return {"score_split": self.facts(task).validation} | self.selection
