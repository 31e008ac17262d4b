"""What the runs on dialogues share: model, tokenizer, template, packed threads, bases; and what identifies a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune import models
from finetune.data.chat import ChatTemplate, chat_template
from finetune.data.oasst import PackedSplit, load_chat
from finetune.methods import base_method, deciding, needs_bases, with_own_choices
from finetune.runs.execution import check_length, read_bases
from finetune.training.options import TrainingOptions
from sparsegrad import Basis

TASK = "oasst1"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ChatInputs:
    """What the runs of a cell share, loaded once.

    Attributes:
        config: the composed configuration (``conf/llama.yaml``) as plain dictionaries; a variant's own choices are put
            into its protocol.
    """

    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", with_own_choices(self.config))

    @property
    def root(self) -> str:
        """Folder of models and data."""
        return self.config["chat"]["root"]

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the starting weights."""
        return models.fingerprint(self.config["model"], self.root)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return models.load_tokenizer(self.config["model"], self.root)

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template, which answering uses too."""
        return chat_template(self.config["model"].get("template"), self.tokenizer)

    @cached_property
    def splits(self) -> dict[str, PackedSplit]:
        """Packed training and validation blocks."""
        config = self.config
        return load_chat(
            config["chat"],
            self.tokenizer,
            self.template,
            length=config["scale"]["max_length"] or config["protocol"]["max_length"],
            loss_on=config["protocol"]["loss_on"],
            limit=config["scale"]["train_examples"],
        )

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What gradients and bases were made for, written into their files and checked when they are read."""
        return {
            "model_sha256": self.fingerprint,
            "task": TASK,
            "preliminary": dict(self.config["protocol"]["preliminary"]),
            "data": self.data_identity,
        }

    @property
    def data_identity(self) -> dict[str, Any]:
        """What decides the examples."""
        chosen = {key: self.config["chat"][key] for key in _CHOICES}
        splits = {role: {"sha256": split.sha256, "rows": len(split)} for role, split in self.splits.items()}
        return chosen | splits | {"template": self.template.name, "length": self.splits["train"].longest}

    @cached_property
    def bases(self) -> tuple[dict[str, Basis], dict[str, Any]]:
        """Bases from the file ``basis``.

        Raises:
            ValueError: if they are missing, damaged, or of another checkpoint, data or preliminary phase.
        """
        return read_bases(Path(self.config["basis"]), self.facts, self.config["model"]["name"])

    def load_model(self, seed: int) -> nn.Module:
        """The starting model, on the CPU; ValueError if tokens or rows don't fit it."""
        model = models.load_causal(self.config["model"], self.root, seed)
        check_length(model, self.splits.values())
        rows, largest = (
            model.get_input_embeddings().num_embeddings,
            max(int(split.input_ids.max()) for split in self.splits.values()),
        )
        if largest >= rows:
            raise ValueError(f"token {largest} of the data, but the model embeds {rows}: tokenizer and model differ.")
        return model


_CHOICES = ("languages", "threads", "deleted", "review", "validation_share")
_SIZES = (
    "train_examples", "epochs", "max_steps", "warmup_steps", "evaluation_steps", "micro_batch_size", "precision",
    "frozen_dtype", "max_length",
)  # fmt: skip


# Of conf/protocol: what `hyperparameters` replaces, and where the choices come from.
_NOT_DECIDING = ("batch_size", "learning_rate", "sources")


def identity(inputs: ChatInputs, seed: int) -> dict[str, Any]:
    """Everything that decides a run's numbers; its hash names the record. Paths, device and logging are left out."""
    config = inputs.config
    places = ("checkpoint", "folder", "files", "title", "checksums", "tokenizer")
    return {
        "version": config["version"],
        "kind": "llama",
        "model": {k: v for k, v in config["model"].items() if k not in places} | {"sha256": inputs.fingerprint},
        "method": deciding(config["method"]),
        "protocol": {k: v for k, v in config["protocol"].items() if k not in _NOT_DECIDING},
        "scale": {name: config["scale"][name] for name in _SIZES},
        "basis": ("run" if config["basis"] is None else "task") if needs_bases(config["method"]) else None,
        "data": inputs.data_identity,
        "hyperparameters": hyperparameters(config),
        "seed": seed,
    }


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Learning rate and batch size: given by hand, else the scale's, else the protocol's.

    Each may be one value, or a mapping from methods to values; a variant that it leaves out takes its base's.

    Raises:
        ValueError: if a mapping leaves the method out.
    """
    names, found = (config["method"]["name"], base_method(config["method"])), {}
    for name in ("learning_rate", "batch_size"):
        value = next(place[name] for place in (config, config["scale"], config["protocol"]) if place[name] is not None)
        if isinstance(value, Mapping):
            own = next((method for method in names if method in value), None)
            if own is None:
                raise ValueError(f"{name} is given for {', '.join(value)}; method={names[0]} needs one too.")
            value = value[own]
        found[name] = value
    return found


def training_options(config: Mapping[str, Any], seed: int, processes: int) -> TrainingOptions:
    """Options of one run on so many processes.

    Raises:
        ValueError: if the frozen weights shall be bfloat16 and the computation float32.
    """
    protocol, scale, chosen = config["protocol"], config["scale"], hyperparameters(config)
    precision = scale["precision"] or protocol["precision"]
    if scale["frozen_dtype"] not in DTYPES or (scale["frozen_dtype"] == "bf16" and precision != "bf16"):
        raise ValueError(
            f"scale.frozen_dtype={scale['frozen_dtype']!r} with precision={precision!r}; "
            "allowed: fp32, or bf16 with precision bf16."
        )
    return TrainingOptions(
        learning_rate=chosen["learning_rate"],
        batch_size=chosen["batch_size"],
        epochs=scale["epochs"] or protocol["epochs"],
        max_steps=scale["max_steps"],
        evaluation_steps=scale["evaluation_steps"] or protocol["evaluation_steps"],
        seed=seed,
        accumulation_steps=-(-chosen["batch_size"] // (scale["micro_batch_size"] * processes)),
        evaluation_batch_size=scale["evaluation_batch_size"],
        patience=protocol["patience"],
        weight_decay=protocol["weight_decay"],
        schedule=protocol["schedule"],
        warmup_steps=scale["warmup_steps"] if scale["warmup_steps"] is not None else protocol["warmup_steps"],
        max_grad_norm=protocol["max_grad_norm"],
        precision=precision,
        checkpoint_seconds=scale["checkpoint_seconds"],
    )
