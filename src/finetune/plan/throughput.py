"""How fast a card works: from what was measured on it, or from its peak and a named assumption.

Small models are bound by starting kernels, not by operations. So a step takes a fixed time for each block, and the time
of its operations: where steps of several sizes were measured, both by least squares (within what a card can); else the
measured operations a second alone. For a cell the best there is: ``measured`` (same card, model and method, at the same
precision, in graphs where the run is), ``scaled`` (same card, another model or method, or not in graphs; on a CPU
another precision too), ``calculated`` (peak x utilisation, and an assumed time for each block).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from finetune.plan.flops import Cost
from finetune.published import read_csv
from finetune.store import records

MEASURED, SCALED, CALCULATED, UNKNOWN = "measured", "scaled", "calculated", "unknown"
SPREAD = 2.0  # largest over smallest operations of a step, from which on a fixed time can be told from them


@dataclass(frozen=True)
class Processor:
    """A kind of card, or a CPU.

    Attributes:
        name: for the reader.
        memory, reserve: bytes, as :class:`finetune.plan.Card`; None: not a limit here.
        peak: operations a second by precision (``fp32``, ``bf16``, ``fp64``), dense; empty where unknown.
        bandwidth: bytes a second between memory and processor; None where unknown.
        block_seconds: least time of a training step, a block, launched by Python.
        graph_seconds: fixed time of a training step, a block, from CUDA graphs.
        eigh: operations a second of a float64 eigendecomposition; None where unknown.
        match: what a device's name holds in records, or ``cpu`` for its type.
        price: of an hour, in ``currency``; None: not set.
    """

    name: str
    memory: float | None = None
    reserve: float = 0.0
    peak: Mapping[str, float] = field(default_factory=dict)
    bandwidth: float | None = None
    block_seconds: float = 0.0
    graph_seconds: float = 0.0
    eigh: float | None = None
    match: str | None = None
    price: float | None = None

    def fits(self, needed: float) -> bool | None:
        """Whether so many bytes fit beside the reserve; None where memory is no limit."""
        return None if self.memory is None else needed + self.reserve <= self.memory

    def is_named(self, device: Mapping[str, Any]) -> bool:
        """Whether a record's device is of this kind."""
        if self.match is None:
            return False
        return device.get("type") == "cpu" if self.match == "cpu" else self.match in str(device.get("name", ""))


@dataclass(frozen=True)
class Fact:
    """One measured throughput.

    Attributes:
        card: name of a processor.
        tokens: of a padded row; None: what the plan takes for the task.
        source: where it stands.
        graphs: whether passes came from CUDA graphs.
        checkpointing: whether activations were computed again; None: as the experiment does.
    """

    card: str
    model: str
    method: str
    task: str
    batch: int
    tokens: float | None
    precision: str
    steps_per_second: float
    source: str
    graphs: bool = False
    checkpointing: bool | None = None


@dataclass(frozen=True)
class Rate:
    """How long a card takes for operations.

    Attributes:
        value: operations a second; None: not known.
        kind: ``measured``, ``scaled``, ``calculated`` or ``unknown``.
        source: what it comes from.
        block: seconds of every step for each block, beside its operations.
        least: seconds of a step for each block, at least.
    """

    value: float | None
    kind: str
    source: str
    block: float = 0.0
    least: float = 0.0

    def seconds(self, operations: float, blocks: float) -> float:
        """Of one pass through so many blocks, with its optimizer step; a third of the blocks for a forward pass."""
        assert self.value is not None
        return max(operations / self.value + blocks * self.block, blocks * self.least)


def published_facts() -> list[Fact]:
    """Rows of ``throughput.csv`` that can be used; its other rows say why they can't."""
    return [
        Fact(
            card=row["card"],
            model=row["model"],
            method=row["method"],
            task=row["task"],
            batch=int(row["batch"]),
            tokens=float(row["tokens"]) if row["tokens"] else None,
            precision=row["precision"],
            steps_per_second=float(row["steps_per_second"]),
            source=row["source"],
        )
        for row in read_csv("throughput.csv")
        if row["used"] == "yes"
    ]


def recorded_facts(results: Path, cards: Sequence[Processor], planned: str) -> Iterator[Fact]:
    """Throughput in records: efficiency stages of every experiment, runs of all but the planned one.

    A plan that took the step times of its own runs would agree with them whatever it says.
    """
    for path in sorted(results.glob("*/efficiency/*/*.json")):
        record = records.read_record(path)
        run, treatment = record["run"], record["treatment"]
        for variant in record["variants"]:
            name = _METHOD_OF_FORM.get(variant["name"], variant["name"])
            if variant["status"] == "finished":
                shape = (treatment["batch_size"], record["lengths"]["mean_slots"] / treatment["batch_size"])
                measured = (treatment["precision"], variant["steps_per_second"], str(path))
                how = (treatment.get("graphs", "off") != "off", treatment.get("checkpointing", False))
                for card in _cards(cards, record["device"]):
                    yield Fact(card, run["model"], name, run["task"], *shape, *measured, *how)
    for folder in sorted(results.glob("*/runs")):
        if folder.parent.name != planned:
            yield from _of_runs(folder, cards)


_METHOD_OF_FORM = {"folded": "sparsegrad"}


def _of_runs(folder: Path, cards: Sequence[Processor]) -> Iterator[Fact]:
    for path, record in records.iterate(folder):
        seconds = record.get("training", {}).get("step_seconds_median")
        if record["status"] != "finished" or not seconds:
            continue
        run, treatment = record["run"], record["treatment"]
        tokens = treatment.get("packed_tokens")
        shape = (record["hyperparameters"]["batch_size"], tokens, treatment["precision"])
        graphs = record["training"].get("captured_steps", 0) > 0
        for card in _cards(cards, record["device"]):
            yield Fact(card, run["model"], run["method"], run["task"], *shape, 1 / seconds, str(path), graphs)


def _cards(cards: Sequence[Processor], device: Mapping[str, Any]) -> list[str]:
    return [card.name for card in cards if card.is_named(device)]


class Throughput:
    """Rates of all cards.

    Args:
        facts: what was measured.
        costs: (model, method, checkpointing as of a fact) -> :class:`Cost`, None where that model or method is not
            known.
        tokens: (model, task) -> tokens of a padded row, for facts that do not say.
        assumed: the assumptions of ``conf/plan.yaml``: ``utilisation``, the share of its peak that a card reaches, by
            precision; ``seconds``, of setting up.
        kin: method -> its own name, and those of what it is a variant of, nearest first.
    """

    def __init__(
        self,
        facts: Sequence[Fact],
        costs: Callable[[str, str, bool | None], Cost | None],
        tokens: Callable[[str, str], float],
        assumed: Mapping[str, Any],
        kin: Callable[[str], Sequence[str]] = lambda method: (method,),
    ) -> None:
        self.assumed, self._costs, self._kin = assumed, costs, kin
        self._measured: list[_Step] = []
        for fact in facts:
            cost = costs(fact.model, fact.method, fact.checkpointing)
            if cost is not None:
                length = fact.tokens or tokens(fact.model, fact.task)
                self._measured.append(_Step(fact, cost.training(fact.batch, length), cost.blocks, cost.parameters))

    def rate(
        self, card: Processor, model: str, method: str, task: str, precision: str, *, graphs: bool = False
    ) -> Rate:
        """The best that is known of a card for a cell whose passes come from CUDA graphs, or do not; a CPU has none."""
        graphs = graphs and card.match != "cpu"
        here = [step for step in self._measured if step.fact.card == card.name]
        cell = (model, method, precision, graphs)
        same = [s for s in here if (s.fact.model, s.fact.method, s.fact.precision, s.fact.graphs) == cell]
        for found in ([s for s in same if s.fact.task == task], same):
            if found:
                return _fitted(found, MEASURED, card.peak.get(precision))
        alike = [s for s in here if s.fact.precision == precision or card.match == "cpu"]
        if alike:
            own = [s for s in alike if s.fact.model == model] or self._of_nearest_size(alike, model, method)
            nearest = self._nearest([s for s in own if s.fact.graphs == graphs] or own, method)
            return _fitted(nearest, SCALED, card.peak.get(precision), card.block_seconds)
        if precision in card.peak:
            share = self.assumed["utilisation"][precision]
            source = f"{precision} peak {card.peak[precision] / 1e12:g} TFLOP/s x {share:g}"
            fixed = {"block": card.graph_seconds} if graphs else {"least": card.block_seconds}
            return Rate(card.peak[precision] * share, CALCULATED, source, **fixed)
        return Rate(None, UNKNOWN, "nothing measured, no peak given")

    def _of_nearest_size(self, steps: list[_Step], model: str, method: str) -> list[_Step]:
        """Those of the model with about as many numbers: a tiny one's operations are slower by far."""
        cost = self._costs(model, method, None)
        if cost is None:
            return steps
        nearest = min(steps, key=lambda s: abs(math.log(s.parameters / cost.parameters))).fact.model
        return [s for s in steps if s.fact.model == nearest]

    def _nearest(self, steps: list[_Step], method: str) -> list[_Step]:
        """Those of the method, else of what it is a variant of, else of another variant of that, else all."""
        for name in self._kin(method):
            own = [s for s in steps if s.fact.method == name]
            if found := own or [s for s in steps if name in self._kin(s.fact.method)]:
                return found
        return steps


@dataclass(frozen=True)
class _Step:
    """A measured step: operations, blocks that it goes through, numbers of its model."""

    fact: Fact
    operations: float
    blocks: int
    parameters: int


def _fitted(steps: Sequence[_Step], kind: str, peak: float | None, least: float = 0.0) -> Rate:
    """A fixed time a block and a rate from steps of several sizes, relative errors squared; else their median rate.

    Args:
        peak: operations a second, which no rate exceeds where the steps of all sizes took about as long.
    """
    sources = sorted({step.fact.source for step in steps})
    source = f"{sources[0]}{f' and {len(sources) - 1} more' if len(sources) > 1 else ''}"
    operations = np.array([step.operations for step in steps])
    scale = float(operations.max())
    if scale < SPREAD * operations.min():
        value = median(step.operations * step.fact.steps_per_second for step in steps)
        return Rate(value, kind, source, least=least)
    columns = np.stack([[step.blocks for step in steps], operations / scale], axis=1)
    relative = columns * np.array([[step.fact.steps_per_second] for step in steps])
    bounds = ([0.0, scale / peak if peak else 1e-9], [np.inf, np.inf])
    block, rest = lsq_linear(relative, np.ones(len(steps)), bounds, method="bvls").x.tolist()
    return Rate(scale / rest, kind, source, block=block)
