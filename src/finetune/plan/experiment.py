"""All work of an experiment, from its lists and configuration groups alone.

What a run does is asked of the runs themselves: a problem (:mod:`finetune.runs.problem`) composed as a stage composes
it, with the sizes of its data in place of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from finetune.efficiency.variants import VARIANTS
from finetune.fetch.transport import is_loopback
from finetune.methods import Method, base_method, build_method, build_targets
from finetune.plan.flops import Cost, cost_of, hosvd_operations
from finetune.plan.inputs import chat_blocks, padded_tokens, stopping_epochs, task_rows
from finetune.plan.memory import (
    DTYPES,
    Setup,
    TrainingMemory,
    hosvd_memory,
    meta_model,
    moments_bytes,
    preliminary_memory,
    training_memory,
)
from finetune.plan.work import Decoding, Decomposition, Training, Work
from finetune.runs.cells import PROBLEMS
from finetune.runs.choices import for_task
from finetune.runs.problem import Problem, Run
from finetune.runs.search import SearchSpace
from finetune.store import records
from finetune.store.catalog import CONF
from finetune.training.options import planned_steps

Read = Callable[[str, str], Mapping[str, Any]]
Shape = tuple[int, int]


class Experiment:
    """What an experiment and its configuration groups say.

    Args:
        lists: of :func:`finetune.store.experiment.expand`: lists, and the entries of its ``stages``.
        read: (group, name) -> the content of ``conf/<group>/<name>.yaml``; group ``""`` is ``conf`` itself.
        settings: of ``conf/plan.yaml``.
        results: the folder ``results``: measured lengths, blocks and batch sizes are looked up there.
        data_root: where local data lies.

    Attributes:
        sources: what sizes come from.
    """

    def __init__(
        self, lists: Mapping[str, Any], read: Read, settings: Mapping[str, Any], results: Path, data_root: str
    ) -> None:
        self.lists, self.settings, self.results = lists, settings, results
        self.stages = lists["stages"]
        self.sources: dict[str, str] = {}
        self._data_root, self._stops = data_root, stopping_epochs()
        cached = lru_cache(maxsize=None)
        self.read, self.plain = cached(read), cached(self._plain)
        self.problem, self.cost, self.kin = cached(self._problem), cached(self._cost), cached(self._kin)
        self.tokens = cached(self._tokens)

    def model(self, name: str) -> Mapping[str, Any]:
        """A model's group; one that the pipeline pretrains gets the vocabulary that its tokenizer will have."""
        found = dict(self.read("model", name))
        if name in self.lists["pretrain"]:
            made = self.read("", "pretrain")["decoder" if "template" in found else "encoder"]
            found["architecture"] = {"vocab_size": made["vocab_size"]} | found["architecture"]
        return found

    def method(self, name: str) -> Mapping[str, Any]:
        """A method's group, or a variant of the efficiency stage as one."""
        for variant in VARIANTS:
            if variant.name == name and variant.form:
                form = {"form": variant.form, "matmul": variant.matmul, "core": variant.core}
                return {"name": name, "base": variant.method} | form
        return self.read("method", name)

    def _problem(self, model: str, method: str) -> Problem:
        """What the runs of a cell are, without its data."""
        group = self.model(model)
        name, data, within = ("chat", "chat", "llama/") if "template" in group else ("glue", "data", "")
        config = {
            "model": group,
            "method": self.method(method),
            "protocol": self.read("protocol", within + self.lists["protocol"]),
            "scale": self.read("scale", within + self.lists["scale"]),
            data: self._data(data),
            "training": self.read("", name)["training"],
            "learning_rate": None,
            "batch_size": None,
            "basis": "of the basis stage",
        }
        return _without_data(PROBLEMS[name], lambda task: self.rows(model, task))(config)

    def _data(self, group: str) -> dict[str, Any]:
        """The data group; tasks that an experiment makes itself lie in its own results."""
        found, own = dict(self.read(group, self.lists[group])), "${name}"
        root = found["root"].replace(own, self.lists["name"]) if own in found["root"] else self._data_root
        return found | {"root": root}

    def rows(self, model: str, task: str) -> tuple[int, int]:
        """Training and validation rows of a task, or blocks of dialogues, as a run takes them."""
        decoder, chat = "template" in self.model(model), self.lists["chat"]
        if decoder:
            train, held, source = chat_blocks(self.results, chat, model, self.settings["blocks"])
            self.sources[f"blocks of {chat}, {model}"] = source
        else:
            sizes = self.settings["rows"]
            if self.lists["data"] == "generated":
                sizes = {task: self.read("", "generate")["glue"], "source": "conf/generate.yaml"}
            train, held, self.sources[f"rows of {task}"] = task_rows(self._data("data"), sizes, task)
        scale = self.read("scale", ("llama/" if decoder else "") + self.lists["scale"])
        return min(train, scale["train_examples"] or train), held

    def _tokens(self, model: str, task: str) -> float:
        """Tokens of a padded row."""
        problem = self.problem(model, "full")
        config = problem.config
        protocol, planned = config["protocol"], {entry["model"] for entry in self.stages["bases"].values()}
        if "chat" in config:
            return config["scale"]["max_length"] or protocol["max_length"]
        found, source = padded_tokens(
            self.results, CONF / "lengths", config["model"], protocol, task, problem.hyperparameters()["batch_size"]
        )
        if model in planned or model in self.lists["efficiency_models"]:
            self.sources[f"tokens of a row, {model} {task}"] = source
        return found

    def _plain(self, model: str) -> nn.Module:
        """A model without weights; who counts what trains sets its flags."""
        group = self.model(model)
        return meta_model(group["architecture"], causal="template" in group)

    def _cost(self, model: str, method: str, checkpointing: bool | None = None) -> Cost:
        """Operations of a method on a model; checkpointing as its scale says, unless it is given."""
        config = self.problem(model, method).config
        chosen = build_method(*_groups(config), bases={}, one_backward_a_step=True)
        own = config["scale"].get("gradient_checkpointing", False)
        return cost_of(self.plain(model), chosen, checkpointing=own if checkpointing is None else checkpointing)

    def _kin(self, method: str) -> tuple[str, ...]:
        """A method's name, that of what it extends, its base's, and those of the classes that implement it."""
        group, model = self.method(method), [*self.lists["models"], *self.lists["decoders"]][0]
        chosen = build_method(*_groups(self.problem(model, method).config), bases={}, one_backward_a_step=True)
        classes = [c.__name__ for c in type(chosen).__mro__ if issubclass(c, Method) and c is not Method]
        return tuple(filter(None, (method, group.get("extends"), base_method(group), *classes)))

    def shapes(self, model: str) -> dict[str, Shape]:
        """Layer kind -> shape of SparseGrad's target matrices."""
        _, group, protocol = _groups(self.problem(model, "full").config)
        targets = build_targets("sparsegrad", group, protocol).find(self.plain(model))
        return {target.kind: target.shape for target in targets}

    def setup(self, model: str, method: str) -> Setup:
        """Sizes of a run at the largest batch that its search may try, and the longest rows."""
        problem = self.problem(model, method)
        config, scale, batch = problem.config, problem.config["scale"], problem.hyperparameters()["batch_size"]
        tokens = scale.get("max_length") or config["protocol"]["max_length"]
        if problem.searches:
            space = SearchSpace.of(config)
            tried = [point["batch_size"] for point in space.points]
            batch = max(*tried, batch) if len(tried) >= space.trials else max(*tried, *space.batch_sizes)
            tokens = min(tokens, config["model"]["architecture"].get("max_position_embeddings", tokens))
        micro = min(scale.get("micro_batch_size", batch), batch)
        return Setup(
            micro_batch=micro,
            tokens=tokens,
            accumulation_steps=-(-batch // micro),
            precision=problem.precision,
            frozen_dtype=scale.get("frozen_dtype", "fp32"),
            checkpointing=scale.get("gradient_checkpointing", False),
            touched=self.settings["touched"],
            logits_chunk=scale.get("logits_chunk"),
        )

    def preparing(self, model: str) -> dict[str, dict[str, int]]:
        """Memory of what comes before methods that rotate gradients: the preliminary phase and the HOSVD."""
        _, group, protocol = _groups(self.problem(model, "full").config)
        plain, setup = self._plain(model), self.setup(model, "full")  # of its own: it is changed
        targets = build_targets("sparsegrad", group, protocol).find(plain)
        found = preliminary_memory(plain, targets, protocol["preliminary"], setup)
        return {"preliminary": found, "hosvd": hosvd_memory(self.shapes(model).values())}

    def moments(self, model: str) -> int:
        """Bytes of a task's moments on disk."""
        return sum(moments_bytes(shape) for shape in self.shapes(model).values())

    def memory(self, model: str, method: str) -> TrainingMemory:
        """Memory of a cell's training."""
        groups = _groups(self.problem(model, method).config)
        return training_memory(*groups, self.setup(model, method), causal="template" in self.model(model))

    def work(self) -> Iterator[Work]:
        """Every piece of work, stage by stage."""
        for entry in self.stages["bases"].values():
            yield from self._bases(entry["model"], entry["tasks"])
        for entry in self.stages["train"].values():
            for task in entry["tasks"]:
                yield from self._cell(entry["model"], entry["method"], task, len(entry["seeds"]))
        for entry in self.stages["efficiency"].values():
            yield from self._efficiency(entry["model"], entry["tasks"])
        for entry in self.stages["answers"].values():
            for method in entry["methods"]:
                yield self._answers(entry["model"], method, len(entry["seeds"]))
                if is_loopback(self.read("judge", self.lists["judge"])["base_url"] or ""):
                    yield self._judgments(entry["model"], method, len(entry["seeds"]))

    def judge_calls(self, model: str) -> int:
        """Of one method and seed."""
        repeats = self.problem(model, "full").config["scale"]["judging"]["repeats"]
        return self.settings["questions"] * self.settings["turns"] * repeats

    def _bases(self, model: str, tasks: list[str]) -> Iterator[Work]:
        problem = self.problem(model, "full")
        options = problem.config["protocol"]["preliminary"]
        piece = Training(
            stage="gradients",
            model=model,
            method="full",
            task="",
            runs=1,
            steps=options["steps"],
            batch=options["batch_size"],
            tokens=0,
            precision=problem.precision if "chat" in problem.config else "fp32",
            cost=self.cost(model, "full"),
        )
        yield from (replace(piece, task=task, tokens=self.tokens(model, task)) for task in tasks)
        each = hosvd_operations(self.shapes(model))
        yield Decomposition(stage="basis", model=model, method="", task="all", runs=len(tasks), each=each)

    def _cell(self, model: str, method: str, task: str, seeds: int) -> Iterator[Work]:
        """Search and runs of one task, and where the protocol says so the preliminary phase inside each."""
        problem = self.problem(model, method)
        named: dict[str, Any] = {"model": model, "method": method, "task": task}
        given, pieces = problem.hyperparameters(self._best(model, method, task)), []
        if problem.searches:
            scale = problem.config["scale"]["search"]
            trial = Run(task, 0, given | {"max_steps": for_task(scale["max_steps"], task)}, search=True)
            # A trial follows the one before it.
            search = replace(self._training("search", named, trial, scale["trials"]), jobs=1)
            pieces.append(search)
            if "extend" in scale:
                pieces.append(replace(search, runs=scale["extend"], stopped=0.0, jobs=0))
        pieces.append(self._training("train", named, Run(task, 0, given), seeds))
        for piece in pieces:
            yield piece
            if problem.basis_scope == "run":
                options = problem.config["protocol"]["preliminary"]
                sizes = {"steps": options["steps"], "batch": options["batch_size"], "stopped": None, "interval": None}
                yield replace(piece, **sizes, cost=self.cost(model, "full"), inside=True, graphs=False)
                each = hosvd_operations(self.shapes(model))
                yield Decomposition(stage=piece.stage, **named, runs=piece.runs, each=each, inside=True)

    def _best(self, model: str, method: str, task: str) -> Mapping[str, Any] | None:
        """What a search found, where it has run."""
        path = self.results / self.lists["name"] / "search" / model / method / f"{task}.json"
        if path.is_file():
            self.sources["batch sizes"] = f"searches in {path.parents[2]}"
            return records.read_record(path)["best"]
        scale = self.lists["scale"]
        self.sources.setdefault("batch sizes", f"scale {scale}; an epoch takes about as long with another")
        return None

    def _training(self, stage: str, named: Mapping[str, Any], run: Run, runs: int) -> Training:
        model, method = named["model"], named["method"]
        problem, (train, held) = self.problem(model, method), self.rows(model, run.task)
        options = problem.options(run, processes=1)
        steps = planned_steps(train, options)
        epochs, stopped = self._stops.get((model, base_method(self.method(method)), run.task)), None
        if options.patience is not None and epochs is not None:
            stopped = min(steps, epochs * train / options.batch_size)
        return Training(
            stage=stage,
            **named,
            runs=runs,
            steps=steps,
            stopped=stopped,
            batch=options.batch_size,
            tokens=self.tokens(model, run.task),
            interval=options.evaluation_steps,
            evaluated=held,
            precision=options.precision,
            cost=self.cost(model, method),
            graphs=options.graphs != "off" and not problem.config["scale"].get("gradient_checkpointing", False),
            passes=options.accumulation_steps,
            evaluation_batch=options.evaluation_batch_size,
        )

    def _efficiency(self, model: str, tasks: list[str]) -> Iterator[Work]:
        scale = self.read("scale/efficiency", self.lists["measurements"])
        # Warm-up twice: before the memory is measured, and before the first round.
        steps = scale["rounds"] * scale["batches"] + 2 * scale["warmup_steps"] + 1
        precision = scale["precision"] or self.problem(model, "full").config["protocol"]["precision"]
        for task in tasks:
            for variant in VARIANTS:
                yield Training(
                    stage="efficiency",
                    model=model,
                    method="sparsegrad" if variant.name == "folded" else variant.name,
                    task=task,
                    runs=1,
                    steps=steps,
                    batch=scale["batch_size"],
                    tokens=self.tokens(model, task),
                    precision=precision,
                    cost=self.cost(model, variant.name),
                )

    def _answers(self, model: str, method: str, seeds: int) -> Decoding:
        options, cost = self.problem(model, method).config["scale"]["answers"], self.cost(model, method)
        new = -(-self.settings["questions"] // options["batch_size"]) * options["max_new_tokens"]
        weights = DTYPES[options["dtype"]].itemsize * cost.parameters
        return Decoding(
            stage="answers",
            model=model,
            method=method,
            task="mt_bench",
            runs=seeds,
            steps=new * self.settings["turns"],
            weights=weights,
            blocks=cost.blocks,
        )

    def _judgments(self, model: str, method: str, seeds: int) -> Decoding:
        judge, parallel = self.settings["judge"], self.problem(model, method).config["scale"]["judging"]["parallel"]
        return Decoding(
            stage="judgments",
            model=model,
            method=method,
            task="mt_bench",
            runs=seeds,
            steps=-(-self.judge_calls(model) // parallel) * judge["completion_tokens"],
            weights=judge["weights"],
            blocks=0,
        )


def _groups(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    return config["method"], config["model"], config["protocol"]


def _without_data(problem: type[Problem], rows: Callable[[str], tuple[int, int]]) -> type[Problem]:
    """The problem with the sizes of its splits in place of the splits."""

    class WithoutData(problem):
        def splits(self, task: str = "oasst1") -> dict[str, range]:
            train, held = rows(task)
            return {"train": range(train), "validation": range(held)}

        _packed = property(splits)

    return WithoutData
