"""A training run as its record tells it: its score, how its evaluations went, what it predicted."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from finetune.store.arrays import unpack_array
from finetune.store.checks import REPORT

KINDS = {"train": "trainable_per_layer", "llama": "total"}
"""Kind of a training run (a task of GLUE, a decoder on dialogues) -> the count that its table needs beside
`trainable`."""


_DIVERGED = re.compile(r"(loss|gradient) is ")
"""How the error of a run begins whose loss or gradient was not finite (`finetune.training.loop.NonFiniteLoss`)."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of a run, in percent; of a decoder in nats a token.

    Attributes:
        selecting: Score by which the best evaluation is chosen.
        reported: Score of the same model on the rows that report: the same, unless a half of them selects.
        f1: Of the rows that report, in percent; `None` where it is not measured.
    """

    step: int
    selecting: float
    reported: float
    f1: float | None = None


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a run predicted, `(rows,)` each.

    Attributes:
        labels: What was expected: classes or values; of a decoder the number of predicted tokens.
        best: Of the best evaluation: classes or values; of a decoder the summed loss of each row.
        last: Of the last one.
    """

    labels: np.ndarray
    best: np.ndarray
    last: np.ndarray


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        score: `metric` on the validation split: in percent, of a decoder the best loss in nats a token.
        scale: Sizes and steps: `smoke`, `local` or `paper`.
        version: Version of the configuration.
        trainable_per_layer: Entries of one wrapped MLP matrix that a step updates, mean over the wrapped matrices.
        matrix: Entries of one wrapped MLP matrix; `None` where the record's configuration does not tell.
        total: Number of parameters of the model; 0 where the record does not tell.
        evaluations: In their order.
        packed: The record's `predictions`; `None` where it has none.
    """

    path: str
    model: str
    title: str
    task: str
    seed: int
    score: float
    metric: str
    scale: str
    version: int
    random_weights: bool
    trainable: int
    trainable_per_layer: float
    matrix: int | None = None
    total: int = 0
    evaluations: tuple[Evaluation, ...] = ()
    packed: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def share(self) -> float:
        """Trainable parameters in percent of the model."""
        return 100 * self.trainable / self.total

    @cached_property
    def predictions(self) -> Predictions | None:
        """What it predicted of the rows that its score is of.

        Raises:
            ValueError: If an array is damaged, or of another length than the others.
        """
        if self.packed is None:
            return None
        names = ("labels", "best", "last")
        arrays = {name: unpack_array(read_key(self.path, self.packed, name)) for name in names}
        report = self.packed.get("report")
        rows = np.ones(arrays["labels"].size, bool) if report is None else unpack_array(report)
        if len({rows.size, *(array.size for array in arrays.values())}) > 1:
            sizes = ", ".join(f"{name} {array.size}" for name, array in (arrays | {"report": rows}).items())
            raise ValueError(f"{self.path}: arrays of predictions differ in length ({sizes}); run it again")
        return Predictions(**{name: array[rows] for name, array in arrays.items()})


def read_run(path: str, record: Mapping[str, Any]) -> Run:
    """Read a finished run."""
    run = {name: read_key(path, record, "run", name) for name in ("model", "task", "seed", "scale", "kind")}
    kind, seed = run.pop("kind"), run["seed"]
    decoder, score, version = kind == "llama", read_key(path, record, "score"), read_key(path, record, "version")
    if not is_number(score) or not (score >= 0 if decoder else -1 <= score <= 1):
        allowed = "a loss >= 0" if decoder else "a finite score in [-1, 1] (a fraction, not percent)"
        raise ValueError(
            f"{path}: score is {score!r}; a finished run has {allowed}: repair the run or set its status to 'failed'"
        )
    for name in ("trainable", KINDS[kind]):
        read_key(path, record, "parameters", name)
    counts = {name: record["parameters"].get(name, 0) for name in ("trainable", "trainable_per_layer", "total")}
    good = all(is_number(count) and count >= 0 for count in counts.values())
    good = good and (not decoder or 0 < counts["trainable"] <= counts["total"])
    if not good or not isinstance(seed, int) or not isinstance(version, int):
        raise ValueError(f"{path}: seed={seed!r}, version={version!r}, {counts}; integers and counts >= 0 are needed")
    architecture = record.get("config", {}).get("model", {}).get("architecture", {})
    sides = [architecture.get(name) for name in ("hidden_size", "intermediate_size")]
    return Run(
        path=path,
        title=read_key(path, record, "model", "title"),
        score=float(score) if decoder else 100 * score,
        metric=read_key(path, record, "metric"),
        version=version,
        random_weights=bool(read_key(path, record, "model", "random_weights")),
        matrix=sides[0] * sides[1] if all(isinstance(side, int) for side in sides) else None,
        evaluations=tuple(_evaluations(record, 1 if decoder else 100)),
        packed=record.get("predictions"),
        **run,
        **counts,
    )


def _evaluations(record: Mapping[str, Any], scale: float) -> Iterator[Evaluation]:
    metric = record["metric"]
    for one in record.get("evaluations", ()):
        f1 = one.get(f"{REPORT}f1", one.get("f1"))
        scores = scale * one[metric], scale * one.get(REPORT + metric, one[metric])
        yield Evaluation(one["step"], *scores, None if f1 is None else scale * f1)


def diverged(record: Mapping[str, Any]) -> bool:
    """Whether a failed run's loss or gradient was not finite; others failed of memory or disk."""
    return _DIVERGED.match(str(record.get("error"))) is not None


def status_of(path: str, record: Mapping[str, Any]) -> str:
    """Return `finished` or `failed`, or refuse a record of another schema or status."""
    schema, status = read_key(path, record, "schema"), read_key(path, record, "status")
    if schema != 1 or status not in ("finished", "failed"):
        raise ValueError(f"{path}: schema={schema!r}, status={status!r}; schema 1, 'finished' or 'failed' are read")
    return status


def read_key(path: str, content: Any, *keys: str) -> Any:
    """Read a nested key, or say which one is missing where."""
    value = content
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"{path}: there is no {'.'.join(keys)!r}; write the file again, or leave it out")
        value = value[key]
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
