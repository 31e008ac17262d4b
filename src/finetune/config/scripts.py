"""The whole configuration of every script: the files that lie in ``conf`` itself, with their groups."""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Literal, Self

from annotated_types import Len
from pydantic import model_validator

from finetune.config.groups import Chat, Data, Judge, Method, Model, Questions
from finetune.config.protocols import ChatProtocol, Protocol
from finetune.config.scales import (
    ChatScale,
    CurveScale,
    EfficiencyScale,
    EnergyScale,
    HosvdScale,
    Judging,
    Point,
    Scale,
)
from finetune.config.types import (
    Count,
    Device,
    ForMethod,
    Group,
    Name,
    NotNegative,
    PathText,
    Positive,
    Precision,
    Rising,
    Seed,
    Share,
    Some,
    Text,
    Wandb,
    Within,
    Workers,
    refused,
)  # fmt: skip


class Tracking(Group):
    """Where wandb's mirror goes."""

    mode: Wandb
    project: Text
    folder: PathText


class Work(Group):
    """``conf/base.yaml``, and what scripts beside it have in common."""

    name: Name
    version: Count
    output: PathText
    checkpoints: PathText
    device: Device
    threads: Count | None
    progress: bool
    seed: Seed


class Passes(Group):
    """How the passes of a training run."""

    graphs: Literal["auto", "off"]


class Base(Work):
    """``conf/base.yaml``."""

    cell: PathText | None
    basis: PathText | None
    workers: Workers
    wandb: Tracking
    model: Model


class Glue(Base):
    """``conf/glue.yaml``."""

    problem: Literal["glue"]
    data: Data
    method: Method
    protocol: Protocol
    scale: Scale
    learning_rate: ForMethod[Positive]
    batch_size: ForMethod[Count]
    training: Passes

    @model_validator(mode="after")
    def _points_lie_in_the_space(self) -> Self:
        if self.protocol.search is not None and self.scale.search is not None:
            (low, high), sizes = self.protocol.search.learning_rate, self.protocol.search.batch_sizes
            own = self.scale.batch_size
            batches = list(own.values()) if isinstance(own, dict) else [own]
            for point in chain.from_iterable(self.scale.search.tried.values()):
                given = [point.batch_size] if isinstance(point, Point) else batches
                rate = point.learning_rate if isinstance(point, Point) else point
                if not low <= rate <= high or not set(given) <= set(sizes):
                    raise refused(f"scale.search.points has {rate} x {given}; allowed: within {[low, high]} x {sizes}")
        return self


class Dialogues(Base):
    """``conf/chat.yaml``."""

    problem: Literal["chat"]
    chat: Chat
    method: Method
    protocol: ChatProtocol
    scale: ChatScale
    learning_rate: ForMethod[Positive]
    batch_size: ForMethod[Count]
    training: Passes

    @model_validator(mode="after")
    def _stores_what_it_computes(self) -> Self:
        precision = self.scale.precision or self.protocol.precision
        if self.scale.frozen_dtype == "bf16" and precision != "bf16":
            raise refused(f"scale.frozen_dtype='bf16' with precision={precision!r}; allowed: fp32, or both bf16")
        return self


class Efficiency(Base):
    """``conf/efficiency.yaml``."""

    data: Data
    protocol: Protocol
    scale: EfficiencyScale
    batch_size: Count | None
    variants: Some[Name] | None
    lengths_only: bool


class Measure(Group):
    """Of ``conf/energy.yaml``: what is measured of a matrix."""

    shares: Rising[Share]
    stripe_shares: Rising[Share]
    levels: Rising[Share]
    threshold: Positive


class Energy(Base):
    """``conf/energy.yaml``."""

    data: Data
    protocol: Protocol
    methods: Annotated[dict[Name, Method], Len(1)]
    scale: EnergyScale
    measure: Measure

    @model_validator(mode="after")
    def _follows_what_it_has(self) -> Self:
        unknown = [name for name in self.scale.trajectories if name not in self.methods]
        if unknown:
            raise refused(f"scale.trajectories has {unknown[0]!r}; allowed: {', '.join(self.methods)}")
        return self


class MTBench(Work):
    """``conf/mt_bench.yaml``."""

    cell: PathText | None
    methods: Some[Name] | None
    checkpoint: PathText | None
    model: Model
    method: Method
    questions: Questions
    judge: Judge
    protocol: ChatProtocol
    scale: ChatScale


class JudgingScale(Group):
    """Of ``conf/judge_agreement.yaml``."""

    judging: Judging


class JudgeAgreement(Group):
    """``conf/judge_agreement.yaml``."""

    questions: Questions
    judge: Judge
    judgments: Within
    models: Some[Text] | None
    version: Count
    part: Count | None
    seed: Seed
    scale: JudgingScale
    output: PathText
    checkpoints: PathText
    progress: bool


class HosvdCost(Work):
    """``conf/hosvd_cost.yaml``."""

    results: bool
    scale: HosvdScale
    rank: Count
    noise: NotNegative

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        limit = min(min(case.shape) for case in self.scale.cases.values())
        if self.rank > limit:
            raise refused(f"rank={self.rank}; allowed: 1 to {limit}, the smallest side of scale.cases")
        return self


class CostCurves(Work):
    """``conf/cost_curves.yaml``."""

    results: bool
    scale: CurveScale
    precision: Precision
    clock: Literal["wall", "cpu"]
    decay: NotNegative

    @model_validator(mode="after")
    def _clock_fits(self) -> Self:
        if self.clock == "cpu" and self.threads != 1:
            raise refused(f"clock='cpu' adds up the time of all threads; threads={self.threads}, allowed: 1")
        return self
