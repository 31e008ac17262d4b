"""All work of an experiment, from its lists and configuration groups alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from finetune.efficiency.variants import VARIANTS
from finetune.methods import base_method, build_method, build_targets, needs_bases, with_own_choices
from finetune.plan.flops import Cost, cost_of, hosvd_operations
from finetune.plan.inputs import chat_blocks, padded_tokens, stopping_epochs, task_rows
from finetune.plan.memory import DTYPES, Setup, TrainingMemory, meta_model, training_memory
from finetune.plan.work import Decoding, Decomposition, Training, Work
from finetune.runs.problem import for_task
from finetune.store import records

Read = Callable[[str, str], Mapping[str, Any]]


class Experiment:
    """What an experiment file and its configuration groups say.

    Args:
        lists: the experiment file.
        read: (group, name) -> the content of ``conf/<group>/<name>.yaml``; group ``""`` is ``conf`` itself.
        settings: of ``conf/plan.yaml``: ``rows``, ``blocks``.
        results: the folder ``results``: measured lengths, blocks and batch sizes are looked up there.
        data_root: where local data lies.

    Attributes:
        sources: what sizes come from.
    """

    def __init__(
        self, lists: Mapping[str, Any], read: Read, settings: Mapping[str, Any], results: Path, data_root: str
    ) -> None:
        self.lists, self.read, self.settings, self.results = lists, read, settings, results
        self.data = _data_group(lists, read, data_root) if lists.get("models") else {}
        self.sources: dict[str, str] = {}
        self._costs: dict[tuple[str, str], Cost] = {}
        self._stops = stopping_epochs()

    @cached_property
    def protocol(self) -> Mapping[str, Any]:
        """Of the encoders."""
        return self.read("protocol", self.lists["protocol"])

    @cached_property
    def scale(self) -> Mapping[str, Any]:
        """Of the encoders."""
        return self.read("scale", self.lists["scale"])

    @cached_property
    def chat_protocol(self) -> Mapping[str, Any]:
        """Of the decoders."""
        return self.read("protocol/llama", self.lists["protocol"])

    @cached_property
    def chat_scale(self) -> Mapping[str, Any]:
        """Of the decoders."""
        return self.read("scale/llama", self.lists["scale"])

    def model(self, name: str) -> Mapping[str, Any]:
        """A model's group; one that the pipeline pretrains gets the vocabulary that its tokenizer will have."""
        found = dict(self.read("model", name))
        if name in self._list("pretrain"):
            made = self.read("", "pretrain_chat" if name in self._list("decoders") else "pretrain_glue")
            found["architecture"] = {"vocab_size": made["vocab_size"]} | found["architecture"]
        return found

    def method(self, name: str) -> Mapping[str, Any]:
        """A method's group, or a variant of the efficiency stage as one."""
        for variant in VARIANTS:
            if variant.name == name and variant.form:
                form = {"form": variant.form, "matmul": variant.matmul, "core": variant.core}
                return {"name": name, "base": variant.method} | form
        return self.read("method", name)

    def cells(self) -> list[tuple[str, str]]:
        """(model, method) of every GLUE cell."""
        lists = (("models", "methods"), ("ablation_models", "ablations"))
        return [(model, method) for one, other in lists for model in self._list(one) for method in self._list(other)]

    def decoders(self) -> list[tuple[str, str]]:
        """(model, method) of every decoder's cell."""
        return [(model, method) for model in self._list("decoders") for method in self._list("methods")]

    def tokens(self, model: str, task: str) -> float:
        """Tokens of a padded row."""
        if model in self._list("decoders") or task == "oasst1":
            return self.chat_scale["max_length"] or self.chat_protocol["max_length"]
        found, source = padded_tokens(self.results, self.model(model), self.protocol, task)
        if model in (*self._list("models"), *self._list("ablation_models"), *self._list("efficiency_models")):
            self.sources[f"tokens of a row, {model} {task}"] = source
        return found

    def is_decoder(self, model: str) -> bool:
        """Whether a model writes answers, by its configuration group."""
        return model in self._list("decoders") or "optional_modules" in self.model(model)

    def groups(self, model: str, method: str) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
        """Method, model and protocol, a variant's own choices put into the protocol."""
        protocol = self.chat_protocol if self.is_decoder(model) else self.protocol
        found = with_own_choices({"method": self.method(method), "protocol": protocol})
        return found["method"], self.model(model), found["protocol"]

    def plain(self, model: str) -> nn.Module:
        """A model without weights."""
        return meta_model(self.model(model)["architecture"], causal=self.is_decoder(model))

    def cost(self, model: str, method: str) -> Cost:
        """Operations of a method on a model, calculated once."""
        key = (model, method)
        if key not in self._costs:
            chosen = build_method(*self.groups(model, method), bases={}, one_backward_a_step=True)
            checkpointing = self.is_decoder(model) and self.chat_scale["gradient_checkpointing"]
            self._costs[key] = cost_of(self.plain(model), chosen, checkpointing=checkpointing)
        return self._costs[key]

    def memory(self, model: str, method: str, setup: Setup) -> TrainingMemory:
        """Memory of a method's training."""
        return training_memory(*self.groups(model, method), setup, self.plain(model))

    def shapes(self, model: str) -> dict[str, tuple[int, int]]:
        """Layer kind -> shape of SparseGrad's target matrices."""
        protocol = self.chat_protocol if self.is_decoder(model) else self.protocol
        targets = build_targets("sparsegrad", self.model(model), protocol).find(self.plain(model))
        return {target.kind: target.shape for target in targets}

    def work(self) -> Iterator[Work]:
        """Every piece of work, stage by stage."""
        yield from self._preliminary()
        for model, method in self.cells():
            for task in self._list("tasks"):
                for stage in ("search", "train"):
                    piece = self._training(stage, model, method, task)
                    yield piece
                    yield from self._inside(piece)
        yield from self._efficiency()
        yield from self._decoders()

    def batch_size(self, model: str, method: str, task: str) -> int:
        """Of the report's runs: what the search found where it has run, else the scale's."""
        path = self.results / self.lists["name"] / "search" / model / method / f"{task}.json"
        if path.is_file():
            self.sources["batch sizes"] = f"searches in {path.parents[2]}"
            return records.read_json(path)["best"]["batch_size"]
        self.sources.setdefault("batch sizes", f"scale {self.scale['name']}; an epoch takes about as long with another")
        return self.scale["batch_size"]

    def _list(self, name: str) -> Sequence[Any]:
        return self.lists.get(name) or ()

    def _rows(self, task: str) -> tuple[int, int]:
        sizes = self.settings["rows"]
        if self.lists["data"] == "generated":
            made = self.read("", "generate")["glue"]
            sizes = {task: made, "source": "conf/generate.yaml"}
        train, held, self.sources[f"rows of {task}"] = task_rows(self.data, sizes, task)
        return min(train, self.scale["train_examples"] or train), held

    def _preliminary(self) -> Iterator[Work]:
        options = self.protocol["preliminary"] if self._list("models") else None
        for model in self._list("models"):
            for task in self._list("tasks"):
                tokens = self.tokens(model, task)
                yield Training(
                    "gradients", model, "full", task, 1, options["steps"], None, options["batch_size"], tokens,
                    None, 0, "fp32", self.cost(model, "full"),
                )  # fmt: skip
            each = hosvd_operations(self.shapes(model))
            yield Decomposition("basis", model, "", "all", len(self._list("tasks")), each)

    def _training(self, stage: str, model: str, method: str, task: str) -> Training:
        group = self.method(method)
        protocol, scale = with_own_choices({"method": group, "protocol": self.protocol})["protocol"], self.scale
        batch, (train, held) = self.batch_size(model, method, task), self._rows(task)
        searched = stage == "search"
        planned = (scale["epochs"] or protocol["epochs"]) * math.ceil(train / batch)
        limit = for_task((scale["search"] if searched else scale)["max_steps"], task)
        planned = planned if limit is None else min(planned, limit)
        epochs = self._stops.get((model, base_method(group), task)) if protocol["patience"] is not None else None
        interval = for_task(scale["evaluation_steps"], task)
        if interval is None:
            interval = max(1, round(protocol["evaluation_steps"].get(task, 100) * 16 / batch))
        return Training(
            stage=stage,
            model=model,
            method=method,
            task=task,
            runs=scale["search"]["trials"] if searched else len(self._list("seeds")),
            steps=planned,
            stopped=None if epochs is None else min(planned, epochs * train / batch),
            batch=batch,
            tokens=self.tokens(model, task),
            interval=interval,
            evaluated=held,
            precision=scale["precision"] or protocol["precision"],
            cost=self.cost(model, method),
        )

    def _inside(self, piece: Training) -> Iterator[Work]:
        """The preliminary phase of every run, where the protocol collects bases anew in each."""
        options = self.protocol["preliminary"]
        if not needs_bases(self.method(piece.method)) or options["scope"] != "run":
            return
        sizes = {"steps": options["steps"], "batch": options["batch_size"], "stopped": None, "interval": None}
        yield replace(piece, **sizes, cost=self.cost(piece.model, "full"), inside=True)
        each = hosvd_operations(self.shapes(piece.model))
        yield Decomposition(piece.stage, piece.model, piece.method, piece.task, piece.runs, each, inside=True)

    def _efficiency(self) -> Iterator[Work]:
        if not self._list("efficiency_models"):
            return
        scale = self.read("scale/efficiency", self.lists["scale"])
        # Warm-up twice: before the memory is measured, and before the first round.
        steps = scale["rounds"] * scale["batches"] + 2 * scale["warmup_steps"] + 1
        precision = scale["precision"] or self.protocol["precision"]
        for model in self._list("efficiency_models"):
            for task in self._list("tasks"):
                for variant in VARIANTS:
                    name = "sparsegrad" if variant.name == "folded" else variant.name
                    yield Training(
                        "efficiency", model, name, task, 1, steps, None, scale["batch_size"],
                        self.tokens(model, task), None, 0, precision, self.cost(model, variant.name),
                    )  # fmt: skip

    def _decoders(self) -> Iterator[Work]:
        models = self._list("decoders")
        if not models:
            return
        protocol, scale = self.chat_protocol, self.chat_scale
        seeds = len(self._list("decoder_seeds") or self._list("seeds"))
        precision, tokens = scale["precision"] or protocol["precision"], scale["max_length"] or protocol["max_length"]
        for model in models:
            options = protocol["preliminary"]
            yield Training(
                "gradients", model, "full", "oasst1", 1, options["steps"], None, options["batch_size"],
                tokens, None, 0, precision, self.cost(model, "full"),
            )  # fmt: skip
            yield Decomposition("basis", model, "", "oasst1", 1, hosvd_operations(self.shapes(model)))
        for model, method in self.decoders():
            train, held, source = chat_blocks(self.results, self.lists["chat"], model, self.settings["blocks"])
            self.sources[f"blocks of {self.lists['chat']}, {model}"] = source
            batch = scale["batch_size"] or protocol["batch_size"]
            steps = (scale["epochs"] or protocol["epochs"]) * math.ceil(
                min(train, scale["train_examples"] or train) / batch
            )
            cost = self.cost(model, method)
            yield Training(
                "train", model, method, "oasst1", seeds, min(steps, scale["max_steps"] or steps), None, batch,
                tokens, scale["evaluation_steps"] or protocol["evaluation_steps"], held, precision, cost,
            )  # fmt: skip
            answers = scale["answers"]
            new = math.ceil(self.settings["questions"] / answers["batch_size"]) * answers["max_new_tokens"]
            width = DTYPES[answers["dtype"]].itemsize
            yield Decoding(
                "answers", model, method, "mt_bench", seeds, new * self.settings["turns"], width * cost.parameters,
                cost.blocks,
            )  # fmt: skip


def _data_group(lists: Mapping[str, Any], read: Read, data_root: str) -> dict[str, Any]:
    """The data group; tasks that an experiment makes itself lie in its own results."""
    group = dict(read("data", lists["data"]))
    own = "${name}"
    return group | {"root": group["root"].replace(own, lists["name"]) if own in group["root"] else data_root}
