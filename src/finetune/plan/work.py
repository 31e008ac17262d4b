"""Pieces of work: what the runs of a cell do, in operations, and how long that takes on a card."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from finetune.plan.flops import Cost
from finetune.plan.throughput import CALCULATED, MEASURED, UNKNOWN, Processor, Throughput

Seconds = tuple[float | None, str, str]
"""Seconds of all runs, the kind of rate that they come from, and its source."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Runs of one cell and task.

    Attributes:
        stage: of dvc.yaml, or ``search``.
        runs: how many: seeds, trials, variants of a measurement.
        steps: planned for each, an upper bound where early stopping or pruning may end it.
        stopped: steps of each if it stops where the authors' runs did; None: not known, or never stopped early.
        inside: part of runs that are counted already (bases collected in every run).
    """

    stage: str
    model: str
    method: str
    task: str
    runs: int
    steps: int = 1
    stopped: float | None = None
    inside: bool = False

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
    """

    batch: int
    tokens: float
    precision: str
    cost: Cost = field(repr=False)
    interval: int | None = None
    evaluated: int = 0
    graphs: bool = False

    def operations(self, steps: float) -> float:
        """Of one run of so many steps."""
        found = steps * self.cost.training(self.batch, self.tokens)
        if self.interval is not None:
            found += math.ceil(steps / self.interval) * self.cost.evaluation(self.evaluated, self.tokens)
        return found

    def seconds(self, card: Processor, speed: Throughput, *, stopped: bool = False) -> Seconds:
        steps = self.stopped if stopped and self.stopped is not None else self.steps
        rate = speed.rate(card, self.model, self.method, self.task, self.precision, graphs=self.graphs)
        if rate.value is None:
            return None, rate.kind, rate.source
        found = self.operations(steps) / rate.value
        if rate.kind != MEASURED:
            found = max(found, steps * self.cost.blocks * card.block_seconds)
        return self.runs * found, rate.kind, rate.source


@dataclass(frozen=True, kw_only=True)
class Decomposition(Work):
    """HOSVDs of a basis stage: eigendecompositions in float64, of ``each`` operations."""

    each: float

    def seconds(self, card: Processor, speed: Throughput, *, stopped: bool = False) -> Seconds:
        if card.eigh is None:
            return None, UNKNOWN, "no rate of eigendecompositions given"
        return self.runs * self.each / card.eigh, CALCULATED, f"eigendecompositions at {card.eigh / 1e9:g} GFLOP/s"


@dataclass(frozen=True, kw_only=True)
class Decoding(Work):
    """Answers of a decoder: each new token of a batch, a step, reads all ``weights`` (bytes) of its ``blocks`` once."""

    weights: float
    blocks: int

    def seconds(self, card: Processor, speed: Throughput, *, stopped: bool = False) -> Seconds:
        if card.bandwidth is None:
            return None, UNKNOWN, "no bandwidth given"
        share = speed.utilisation["bandwidth"]
        step = max(self.weights / (card.bandwidth * share), self.blocks * card.block_seconds / 3)
        return self.runs * self.steps * step, CALCULATED, f"weights read at {card.bandwidth / 1e9:g} GB/s x {share:g}"
