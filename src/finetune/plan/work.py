"""Pieces of work: what the runs of a cell do, in operations, and how long that takes on a card."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from finetune.plan.flops import Cost
from finetune.plan.throughput import CALCULATED, UNKNOWN, Processor, Throughput

FORWARD = 1 / 3  # of a training step's fixed time


@dataclass(frozen=True)
class Seconds:
    """How long all runs of a piece of work take.

    Attributes:
        value: one after the other; None: not known.
        kind: of the rate that they come from.
        source: of the rate.
        busy: the part in which the card works, so that no other run on it can; None: all.
    """

    value: float | None
    kind: str
    source: str
    busy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """Runs of one cell and task.

    Attributes:
        stage: of dvc.yaml, or ``search``.
        runs: how many: seeds, trials, variants of a measurement.
        steps: planned for each, an upper bound where early stopping or pruning may end it.
        stopped: steps of each if it stops where the authors' runs did; None: not known, or never stopped early.
        inside: part of runs that are counted already (bases collected in every run).
        jobs: how many of the runs may be made side by side; None: all.
    """

    stage: str
    model: str
    method: str
    task: str
    runs: int
    steps: int = 1
    stopped: float | None = None
    inside: bool = False
    jobs: int | None = None

    def seconds(self, card: Processor, speed: Throughput, *, stopped: bool = False) -> Seconds:
        """How long all runs take, planned or ``stopped``."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Training(Work):
    """Runs that train.

    Attributes:
        batch, tokens: rows of a step, tokens of a row.
        interval: steps between evaluations; None: none.
        evaluated: rows of an evaluation.
        graphs: whether its passes come from CUDA graphs where a card has them.
        passes: backward passes of a step.
        evaluation_batch: rows of a forward pass of an evaluation.
    """

    batch: int
    tokens: float
    precision: str
    cost: Cost = field(repr=False)
    interval: int | None = None
    evaluated: int = 0
    graphs: bool = False
    passes: int = 1
    evaluation_batch: int = 64

    def seconds(self, card: Processor, speed: Throughput, *, stopped: bool = False) -> Seconds:
        steps = self.stopped if stopped and self.stopped is not None else self.steps
        rate = speed.rate(card, self.model, self.method, self.task, self.precision, graphs=self.graphs)
        if rate.value is None:
            return Seconds(None, rate.kind, rate.source)
        parts: list[tuple[float, float, float]] = [
            (steps, self.cost.training(self.batch, self.tokens), self.passes * self.cost.blocks)
        ]
        if self.interval is not None:
            batches = -(-self.evaluated // self.evaluation_batch) * FORWARD
            forward = self.cost.evaluation(self.evaluated, self.tokens)
            parts.append((math.ceil(steps / self.interval), forward, batches * self.cost.blocks))
        found = sum(times * rate.seconds(operations, blocks) for times, operations, blocks in parts)
        fixed = sum(times * blocks * rate.block for times, _, blocks in parts)
        worked = sum(times * operations / rate.value for times, operations, _ in parts)
        if self.graphs and card.match != "cpu" and steps:
            found += speed.assumed["seconds"]["capture"]
        busy = worked + speed.assumed["utilisation"]["fixed"] * fixed
        return Seconds(self.runs * found, rate.kind, rate.source, self.runs * min(found, busy))


@dataclass(frozen=True, kw_only=True)
class Decomposition(Work):
    """HOSVDs of a basis stage: eigendecompositions in float64, of ``each`` operations."""

    each: float

    def seconds(self, card: Processor, speed: Throughput, *, stopped: bool = False) -> Seconds:
        if card.eigh is None:
            return Seconds(None, UNKNOWN, "no rate of eigendecompositions given")
        source = f"eigendecompositions at {card.eigh / 1e9:g} GFLOP/s"
        return Seconds(self.runs * self.each / card.eigh, CALCULATED, source)


@dataclass(frozen=True, kw_only=True)
class Decoding(Work):
    """Answers or judgments: each new token of a batch, a step, reads all ``weights`` (bytes) of ``blocks`` once."""

    weights: float
    blocks: int

    def seconds(self, card: Processor, speed: Throughput, *, stopped: bool = False) -> Seconds:
        if card.bandwidth is None:
            return Seconds(None, UNKNOWN, "no bandwidth given")
        share = speed.assumed["utilisation"]["bandwidth"]
        step = max(self.weights / (card.bandwidth * share), self.blocks * card.block_seconds * FORWARD)
        source = f"weights read at {card.bandwidth / 1e9:g} GB/s x {share:g}"
        return Seconds(self.runs * self.steps * step, CALCULATED, source)
