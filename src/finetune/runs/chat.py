"""Dialogues: a decoder fine-tuned on OpenAssistant threads (paper, section 4.3); the score is the validation loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from finetune import models
from finetune.data.chat import ChatTemplate, chat_template
from finetune.data.oasst import PackedSplit, load_chat
from finetune.methods import Method, base_method, build_targets
from finetune.runs.problem import Problem, Run
from finetune.training.capture import Graphs
from finetune.training.evaluation import Evaluation, evaluate_causal
from finetune.training.gradients import Collected
from finetune.training.options import TrainingOptions, planned_steps
from finetune.training.steps import graphs_mode

TASK = "oasst1"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ChatProblem(Problem):
    """A configuration of ``conf/chat.yaml``. Scores are in nats a token; merged models are kept."""

    kind, group, lists, baseline, keeps_models = "llama", "chat", ("decoder_seeds",), True, True
    sizes = (
        "train_examples", "epochs", "max_steps", "warmup_steps", "evaluation_steps", "micro_batch_size", "precision",
        "frozen_dtype", "max_length",
    )  # fmt: skip
    no_choices = ("sources", "batch_size", "learning_rate")
    task = TASK

    def __init__(self, config: Mapping[str, Any], loads: dict[str, Any] | None = None) -> None:
        super().__init__(config, loads)
        self.stored_dtype = DTYPES[self.config["scale"]["frozen_dtype"]]

    @property
    def gradients_seed(self) -> int:
        return self.config["seed"]

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template, which answering uses too."""
        return chat_template(self.config["model"].get("template"), self.tokenizer)

    def splits(self, task: str = TASK) -> dict[str, PackedSplit]:
        return self._packed

    @property
    def template_name(self) -> str:
        """The template's name, for records and merged models."""
        carried = self.config.get("carried")
        return self.template.name if carried is None else carried["template"]

    def carried_facts(self) -> dict[str, Any]:
        return {"template": self.template.name}

    @cached_property
    def _packed(self) -> dict[str, PackedSplit]:
        config = self.config
        if (carried := self.carried_splits(TASK)) is not None:
            return carried
        how = {
            "length": config["scale"]["max_length"] or config["protocol"]["max_length"],
            "loss_on": config["protocol"]["loss_on"],
            "limit": config["scale"]["train_examples"],
        }
        return self._once("chat", lambda: load_chat(config["chat"], self.tokenizer, self.template, **how), **how)

    def metric(self, task: str) -> str:
        return "loss"

    def evaluator(
        self, task: str, options: TrainingOptions, accelerator: Accelerator
    ) -> Callable[[nn.Module], Evaluation]:
        split = self._packed["validation"]
        graphs = Graphs(accelerator.device, graphs_mode(options, accelerator))

        size, device, report = options.evaluation_batch_size, accelerator.device, self.report_rows(len(split))
        chunk = options.logits_chunk

        def measure(model: nn.Module) -> Evaluation:
            with accelerator.autocast():
                return evaluate_causal(model, split, size, device, graphs, report, chunk)

        return measure

    def load_model(self, task: str, seed: int) -> nn.Module:
        """The starting model; what this method does not train is in its storage precision."""
        return self._loaded(base_method(self.config["method"]), task, seed)

    def _loaded(self, method: str, task: str, seed: int) -> nn.Module:
        """The starting model, of which no float32 copy is made but of what a method trains.

        Where frozen weights are stored in bfloat16 they come in the checkpoint's own precision: 7 billion parameters
        are 27 GB in float32.
        """
        lowered = self.stored_dtype != torch.float32 and not self.config["protocol"]["preliminary"]["update"]
        model = models.load_causal(self.config["model"], self.root, seed, "auto" if lowered else torch.float32)
        if lowered:
            build_targets(method, self.config["model"], self.config["protocol"]).set_trainable(model)
            models.store_trained(model)
            models.cast_frozen(model, self.stored_dtype)
        return self.checked(model, task)

    def prepare(self, method: Method, model: nn.Module, device: torch.device, seed: int) -> nn.Module:
        model = model.to("cpu")  # gradients may have been collected on the device
        if self.config["scale"]["gradient_checkpointing"]:
            models.checkpoint_activations(model)
        model.config.use_cache = False
        torch.manual_seed(seed)  # LoRA draws its weights
        model = method.prepare(model)
        models.cast_frozen(model, self.stored_dtype)
        return model.to(device)

    def gradient_model(self, task: str, seed: int) -> nn.Module:
        """The starting model; what is not differentiated is in its storage precision."""
        config, model = self.config, self._loaded("sparsegrad", task, seed)
        if config["scale"]["gradient_checkpointing"]:
            models.checkpoint_activations(model)
        if not config["protocol"]["preliminary"]["update"]:
            build_targets("sparsegrad", config["model"], config["protocol"]).set_trainable(model)
        return model

    def collect(self, model: nn.Module, task: str, seed: int, device: torch.device) -> Collected:
        """The preliminary phase, in the training's precision."""
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return super().collect(model, task, seed, device)

    def options(self, run: Run, processes: int) -> TrainingOptions:
        protocol, scale = self.config["protocol"], self.config["scale"]
        warmup = scale["warmup_steps"] if scale["warmup_steps"] is not None else protocol["warmup_steps"]
        options = self._options(
            run,
            evaluation_steps=scale["evaluation_steps"] or protocol["evaluation_steps"],
            accumulation_steps=-(-run.hyperparameters["batch_size"] // (scale["micro_batch_size"] * processes)),
        )
        warmup = min(warmup, planned_steps(len(self._packed["train"]), options))
        return replace(options, warmup_steps=warmup, logits_chunk=scale.get("logits_chunk"))

    def made_for(self, task: str) -> dict[str, Any]:
        stored = self.config["scale"]["frozen_dtype"]
        return super().made_for(task) | {"precision": self.precision, "frozen_dtype": stored}

    def identity(self, run: Run) -> dict[str, Any]:
        return super().identity(run) | {"template": self.template_name}  # the merged model is asked in it

    def treatment(self, task: str) -> dict[str, Any]:
        scale = self.config["scale"]
        return {
            "packed_tokens": self._packed["train"].longest,
            "frozen_dtype": scale["frozen_dtype"],
            "gradient_checkpointing": scale["gradient_checkpointing"],
            "schedule": self.config["protocol"]["schedule"],
        }

    def data_facts(self, task: str) -> dict[str, Any]:
        return {
            "score_split": "validation",
            **self.selection,
            "facts": {role: split.facts for role, split in self._packed.items()},
            "template": self.template_name,
        }

    def kept_facts(self) -> dict[str, Any]:
        return {"template": self.template_name}
