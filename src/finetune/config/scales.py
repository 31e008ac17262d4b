"""Sizes: the files of ``conf/scale`` and its folders."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Len
from pydantic import AfterValidator, Discriminator, Tag

from finetune.config.types import (
    Count,
    ForMethod,
    ForTask,
    Group,
    Name,
    NotNegative,
    Positive,
    Precision,
    Rising,
    Seed,
    Share,
    Some,
    Wandb,
    Whole,
    kind,
    with_default,
)  # fmt: skip


class Point(Group):
    """A point that a search tries first."""

    learning_rate: Positive
    batch_size: Count


class Pruning(Group):
    """Of a search: its median pruner."""

    startup_trials: Whole
    warmup_steps: Whole


class SearchSize(Group):
    """Of ``conf/scale``: how long a search is."""

    trials: Count
    points: list[Point]
    max_steps: ForTask[Count]
    pruning: Pruning


class Scale(Group):
    """A file of ``conf/scale``."""

    name: Name
    train_examples: Count | None
    epochs: Count | None
    max_steps: ForTask[Count]
    evaluation_steps: ForTask[Count]
    evaluation_batch_size: Count
    accumulation_steps: Count
    precision: Precision | None
    checkpoint_seconds: NotNegative
    threads: Count | None
    wandb: Wandb
    learning_rate: ForMethod[Positive]
    batch_size: ForMethod[Count]
    search: SearchSize


class Answers(Group):
    """Of ``conf/scale/llama``: how questions are answered."""

    max_new_tokens: Count
    batch_size: Count
    long_prompts: Literal["cut", "refuse"]
    reserve: Count
    seed: Seed
    dtype: Literal["fp32", "bf16", "fp16", "auto"]


class Judging(Group):
    """Of ``conf/scale/llama``: how much a judge is asked."""

    parallel: Count
    repeats: Count


class ChatScale(Group):
    """A file of ``conf/scale/llama``."""

    name: Name
    train_examples: Count | None
    epochs: Count | None
    max_steps: ForTask[Count]
    warmup_steps: Whole | None
    batch_size: ForMethod[Count]
    learning_rate: ForMethod[Positive]
    evaluation_steps: Count | None
    evaluation_batch_size: Count
    micro_batch_size: Count
    gradient_checkpointing: bool
    precision: Precision | None
    frozen_dtype: Literal["fp32", "bf16"]
    max_length: Annotated[int, Ge(3)] | None
    checkpoint_seconds: NotNegative
    threads: Count | None
    wandb: Wandb
    answers: Answers
    judging: Judging


class EfficiencyScale(Group):
    """A file of ``conf/scale/efficiency``."""

    name: Name
    rows: Count | None
    batch_size: Count
    batches: Count
    rounds: Count
    warmup_steps: Count
    precision: Precision | None
    keep: Literal["auto", "together", "each_round"]
    threads: Count | None
    wandb: Wandb


class EnergyScale(Group):
    """A file of ``conf/scale/energy``."""

    name: Name
    trajectories: Some[Name]
    steps: Annotated[
        Annotated[Rising[Whole], Tag("<one>")]
        | Annotated[dict[Name, Rising[Whole]], AfterValidator(with_default), Tag("<mapping>")],
        Discriminator(kind),
    ]
    batches: Count
    refresh_batches: Count | None
    batch_size: Count
    learning_rate: Positive
    train_examples: Count | None
    evaluation_batch_size: Count
    accumulation_steps: Count
    precision: Precision | None
    picture: Annotated[list[Count], Len(2, 2)]
    threads: Count | None
    wandb: Wandb


class HosvdCase(Group):
    """Gradients of one shape, and how many of them each way is measured on."""

    shape: Annotated[list[Count], Len(2, 2)]
    asked: Count
    ways: Annotated[dict[Literal["streaming", "unfoldings", "unfoldings_float32", "tensorly"], list[Count]], Len(1)]


class HosvdScale(Group):
    """A file of ``conf/scale/hosvd_cost``."""

    name: Name
    cases: Annotated[dict[Name, HosvdCase], Len(1)]
    limit_bytes: Positive | None
    limit_seconds: Positive
    threads: Count | None


class CurvePoint(Group):
    """The point that every curve goes through."""

    hidden: Count
    inner: Count
    tokens: Count
    density: Share


class CurveScale(Group):
    """A file of ``conf/scale/cost_curves``."""

    name: Name
    base: CurvePoint
    densities: Some[Share]
    tokens: Some[Count]
    widths: Some[Count]
    rounds: Count
    steps: Count
    warmup_steps: Count
    precision: Precision
    clock: Literal["wall", "cpu"]
    threads: Count | None
