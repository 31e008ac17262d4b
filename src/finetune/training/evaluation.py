"""Validation: predictions of a split, loss and metric; on halves of it, where one selects and the other reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.examples import Examples
from finetune.store.arrays import pack_array
from finetune.store.checks import REPORT
from finetune.training import metrics
from finetune.training.capture import Batch, Graphs
from finetune.training.losses import causal_outputs, row_losses
from finetune.training.padding import padded

if TYPE_CHECKING:  # reading a task needs pyarrow; a loss does not
    from finetune.data.glue import Split, Task


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a split of n rows.

    Attributes:
        values: ``loss`` and metrics; with a report half those of the other half, and ``report_<name>`` of this one.
        predictions: ``(n,)``: classes, numbers of a regression, or a decoder's summed loss of each row.
        labels: ``(n,)``: what was expected; of a decoder the predicted tokens of each row.
        report: ``(n,)``, bool: the rows that report; None without halves.
    """

    values: dict[str, float]
    predictions: np.ndarray
    labels: np.ndarray
    report: np.ndarray | None = None

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def packed_predictions(self) -> dict[str, str]:
        """For a record."""
        return pack_array(self.predictions, "int8" if self.predictions.dtype.kind == "i" else "float32")

    def packed_rows(self) -> dict[str, Any]:
        """What all evaluations of a run share, for its record."""
        kind = {"f": "float32", "i": "int8" if self.predictions.dtype.kind == "i" else "int32"}[self.labels.dtype.kind]
        report = None if self.report is None else pack_array(self.report, "bool")
        return {"rows": len(self.labels), "report": report, "labels": pack_array(self.labels, kind)}


def report_half(rows: int) -> np.ndarray:
    """Which rows of a split report, where the others select: half of them, drawn once for all models and methods.

    The best of many evaluations is optimistic on the rows that chose it.
    """
    return np.random.default_rng(0).permutation(rows) < rows // 2


def evaluate(
    model: nn.Module,
    split: Split,
    task: Task,
    batch_size: int,
    device: torch.device,
    graphs: Graphs | None = None,
    report: np.ndarray | None = None,
) -> Evaluation:
    """Loss (mean over examples) and the task's metric (and F1 beside accuracy for two classes) over a split.

    Args:
        graphs: of evaluations of this model before; None is eager.
        report: rows that do not select; None measures on all.
    """
    predictions, losses = torch.empty(len(split)), torch.empty(len(split), dtype=torch.float64)
    # Rows of similar length together have the least padding; the result does not depend on their order.
    order = sorted(range(len(split)), key=lambda index: len(split.input_ids[index]))

    def predict(inputs: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(**inputs).logits
        chosen = logits.squeeze(-1) if task.num_labels == 1 else logits.argmax(dim=-1)
        return chosen.float(), row_losses(logits, labels)

    for rows, predicted, loss in _forward(model, split, order, batch_size, graphs or Graphs(device, "off"), predict):
        predictions[rows], losses[rows] = predicted, loss
    expected = split.labels.numpy()
    found = predictions.numpy() if task.num_labels == 1 else predictions.long().numpy()

    def measure(rows: Any) -> dict[str, float]:
        result = {"loss": float(losses.numpy()[rows].mean())}
        result[task.metric] = metrics.compute(task.metric, found[rows], expected[rows])
        if task.metric == "accuracy" and task.num_labels == 2:
            result["f1"] = metrics.compute("f1", found[rows], expected[rows])
        return result

    return Evaluation(_halves(measure, report), found, expected, report)


def evaluate_causal(
    model: nn.Module,
    split: Examples,
    batch_size: int,
    device: torch.device,
    graphs: Graphs | None = None,
    report: np.ndarray | None = None,
    chunk: int | None = None,
) -> Evaluation:
    """Mean cross entropy (``loss``) of a causal language model over the predicted tokens of a split, in nats.

    Args:
        graphs, report: as :func:`evaluate`.
        chunk: tokens whose logits are held at a time; None holds all of a batch.
    """
    rows = range(len(split))
    losses = torch.empty(len(split), dtype=torch.float64)

    def predict(inputs: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        return labels.new_empty(0), causal_outputs(model, model, inputs, labels, chunk)

    for own, _, loss in _forward(model, split, rows, batch_size, graphs or Graphs(device, "off"), predict):
        losses[own] = loss
    summed, targets = losses.numpy(), np.array([split.targets([row]) for row in rows])

    def measure(chosen: Any) -> dict[str, float]:
        return {"loss": float(summed[chosen].sum() / targets[chosen].sum())}

    return Evaluation(_halves(measure, report), summed, targets, report)


def _halves(measure: Callable[[Any], dict[str, float]], report: np.ndarray | None) -> dict[str, float]:
    if report is None:
        return measure(slice(None))
    return measure(~report) | {REPORT + name: value for name, value in measure(report).items()}


@torch.no_grad()
def _forward(
    model: nn.Module,
    split: Examples,
    order: Sequence[int],
    batch_size: int,
    graphs: Graphs,
    predict: Callable[[Batch, Tensor], tuple[Tensor, Tensor]],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows, what is predicted, and each row's summed loss, of every batch, in evaluation mode."""

    def call(batch: Batch) -> tuple[Tensor, Tensor]:
        return predict({name: tensor for name, tensor in batch.items() if name != "labels"}, batch["labels"])

    training = model.training
    model.eval()
    graphs.follow(model)
    for start in range(0, len(order), batch_size):
        rows = list(order[start : start + batch_size])
        batch = padded(split.batch(rows), model) if graphs.active else split.batch(rows)
        (predicted, losses), _ = graphs.run(("evaluation",), batch, call, warm_up=call)
        yield torch.tensor(rows), predicted.cpu(), losses.double().cpu()
    model.train(training)
