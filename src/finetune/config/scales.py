"""Sizes: the files of ``conf/scale`` and its folders."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from annotated_types import Ge, Len
from pydantic import AfterValidator, Discriminator, Tag, model_validator

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
    kind_of_each,
    refused,
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


Tried = Annotated[Annotated[Point, Tag("<mapping>")] | Annotated[Positive, Tag("<one>")], Discriminator(kind_of_each)]
"""A point, or a learning rate, at ``scale.batch_size``."""


def _equal(lists: dict[str, list[Point | float]]) -> dict[str, list[Point | float]]:
    """Points by method, if each has as many as the others."""
    if len({len(points) for points in lists.values()}) > 1:
        counts = ", ".join(f"{name} {len(points)}" for name, points in lists.items())
        raise refused(f"{counts}; allowed: as many points for one method as for another")
    return lists


class SearchSize(Group):
    """Of ``conf/scale``: how long a search is."""

    trials: Count
    points: Annotated[
        Annotated[list[Tried], Tag("<one>")]
        | Annotated[dict[Name, list[Tried]], Len(1), AfterValidator(_equal), Tag("<mapping>")],
        Discriminator(kind_of_each),
    ]
    max_steps: ForTask[Count]
    pruning: Pruning
    extend: Whole = 0

    @property
    def tried(self) -> dict[str, list[Point | float]]:
        """Points by method; under ``all`` where they are the same for each."""
        return self.points if isinstance(self.points, dict) else {"all": self.points}

    @model_validator(mode="after")
    def _has_a_grid_to_extend(self) -> Self:
        for name, points in self.tried.items() if self.extend else ():
            rates = {point.learning_rate if isinstance(point, Point) else point for point in points}
            if len(rates) < 2 or self.trials < len(points):
                given = f"extend={self.extend} with points of {name} at {sorted(rates)} and trials={self.trials}"
                raise refused(f"{given}; allowed: points at two learning rates or more, and trials for all of them")
        return self


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
    selection: Literal["half"] | None
    search: SearchSize | None


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
    selection: Literal["half"] | None
    logits_chunk: Count | None
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
