"""How it is trained: the files of ``conf/protocol`` and ``conf/protocol/llama``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Len
from pydantic import Discriminator, Tag, model_validator

from finetune.config.types import (
    Below1,
    Count,
    ForMethod,
    Fraction,
    Group,
    Module,
    Name,
    NotNegative,
    Pattern,
    Positive,
    Precision,
    Seed,
    Share,
    Some,
    Unique,
    Whole,
    kind,
    refused,
)  # fmt: skip


class Preliminary(Group):
    """Of a protocol: how gradients are collected."""

    steps: Count
    batch_size: Count
    update: bool
    learning_rate: Positive
    scope: Literal["task", "run"]
    keep_weights: bool


class Search(Group):
    """Of a protocol: what is searched."""

    learning_rate: Annotated[list[Positive], Len(2, 2)]
    batch_sizes: Some[Count]

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if not self.learning_rate[0] < self.learning_rate[1]:
            raise refused(f"learning_rate={self.learning_rate}; allowed: [low, high], 0 < low < high")
        return self


class AnyProtocol(Group):
    """What the protocols of encoders and decoders both say."""

    name: Name
    density: Share | None
    orientation: Literal["hosvd", "released", "random"]
    hosvd: Literal["moments", "tensorly"]
    preliminary: Preliminary
    shared_input: Unique[Name] = []
    train: Literal["all", "mlp", "targets"]
    frozen: dict[Module, list[Pattern]]
    gate: Unique[Module] = []
    also_train: Unique[Module] = []
    every_block: Unique[Module] = []
    lora_scale: Annotated[
        Annotated[Positive, Tag("<one>")] | Annotated[Literal["inverse_rank"], Tag("<text>")], Discriminator(kind)
    ]
    lora_dropout: Below1 = 0.0
    meprop_optimizer: Literal["adamw", "lazy_adam"]
    epochs: Count
    patience: Count | None
    schedule: Literal["constant", "linear", "cosine"]
    weight_decay: NotNegative
    max_grad_norm: Positive | None
    precision: Precision
    max_length: Annotated[int, Ge(3)]
    sources: dict[str, Any] = {}


class Protocol(AnyProtocol):
    """A file of ``conf/protocol``."""

    search: Search | None = None
    search_seed: Seed
    warmup_ratio: Fraction
    padding: Literal["longest", "max_length"]
    evaluation_steps: dict[Name, Count]


class ChatProtocol(AnyProtocol):
    """A file of ``conf/protocol/llama``."""

    learning_rate: ForMethod[Positive]
    batch_size: ForMethod[Count]
    warmup_steps: Whole
    evaluation_steps: Count
    loss_on: Literal["answers", "all"]
