"""How fast a card works: from what was measured on it, or from its peak and a named assumption.

A measured number of steps a second, times the operations of its step, is a rate in operations a second. For a cell the
best there is: ``measured`` (same card, model and method, at the same precision, in graphs where the run is), ``scaled``
(same card, another model or method, or not in graphs; on a CPU another precision too), ``calculated`` (peak x
utilisation). Small models are bound by starting kernels, not by operations: where nothing was measured, a step takes at
least ``block_seconds`` for each block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from finetune.plan.flops import Cost
from finetune.published import read_csv
from finetune.store import records

MEASURED, SCALED, CALCULATED, UNKNOWN = "measured", "scaled", "calculated", "unknown"


@dataclass(frozen=True)
class Processor:
    """A kind of card, or a CPU.

    Attributes:
        name: for the reader.
        memory, reserve: bytes, as :class:`finetune.plan.Card`; None: not a limit here.
        peak: operations a second by precision (``fp32``, ``bf16``, ``fp64``), dense; empty where unknown.
        bandwidth: bytes a second between memory and processor; None where unknown.
        block_seconds: least time of a training step, a block.
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
    """Operations a second on a card.

    Attributes:
        value: None where nothing is known.
        kind: ``measured``, ``scaled``, ``calculated`` or ``unknown``.
        source: what it comes from.
    """

    value: float | None
    kind: str
    source: str


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
        utilisation: share of its peak that a card reaches, by precision: an assumption.
    """

    def __init__(
        self,
        facts: Sequence[Fact],
        costs: Callable[[str, str, bool | None], Cost | None],
        tokens: Callable[[str, str], float],
        utilisation: Mapping[str, float],
    ) -> None:
        self.utilisation = utilisation
        self._rates: list[tuple[Fact, float]] = []
        for fact in facts:
            cost = costs(fact.model, fact.method, fact.checkpointing)
            if cost is not None:
                length = fact.tokens or tokens(fact.model, fact.task)
                self._rates.append((fact, fact.steps_per_second * cost.training(fact.batch, length)))

    def rate(
        self, card: Processor, model: str, method: str, task: str, precision: str, *, graphs: bool = False
    ) -> Rate:
        """The best that is known of a card for a cell whose passes come from CUDA graphs, or do not; a CPU has none."""
        graphs = graphs and card.match != "cpu"
        here = [(fact, rate) for fact, rate in self._rates if fact.card == card.name]
        cell = (model, method, precision, graphs)
        same = [(f, r) for f, r in here if (f.model, f.method, f.precision, f.graphs) == cell]
        for found in ([(f, r) for f, r in same if f.task == task], same):
            if found:
                return _middle(found, MEASURED)
        alike = [(f, r) for f, r in here if f.precision == precision or card.match == "cpu"]
        for found in ([(f, r) for f, r in alike if f.model == model], alike):
            if found:
                like = [(f, r) for f, r in found if f.method == method] or found
                return _middle([(f, r) for f, r in like if f.graphs == graphs] or like, SCALED)
        if precision in card.peak:
            share = self.utilisation[precision]
            source = f"{precision} peak {card.peak[precision] / 1e12:g} TFLOP/s x {share:g}"
            return Rate(card.peak[precision] * share, CALCULATED, source)
        return Rate(None, UNKNOWN, "nothing measured, no peak given")


def _middle(found: Sequence[tuple[Fact, float]], kind: str) -> Rate:
    sources = sorted({fact.source for fact, _ in found})
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return Rate(median(rate for _, rate in found), kind, f"{sources[0]}{more}")
