"""Validation: predictions of a split, loss and metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data.examples import Examples
from finetune.training import metrics
from finetune.training.capture import Batch, Graphs
from finetune.training.padding import padded

if TYPE_CHECKING:  # reading a task needs pyarrow; a loss does not
    from finetune.data.glue import Split, Task


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, or squared error for float labels, summed over the batch.

    A sum, so that dividing by the predictions of the *whole* batch makes the step independent of how it is cut into
    micro-batches (transformers' classification heads average each micro-batch: transformers#47688).

    Args:
        logits: ``(batch, num_labels)``, or ``(batch, tokens, vocabulary)`` of a causal language model.
        labels: ``(batch,)``, or ``(batch, tokens)``, -100 where nothing is learned; token t is predicted at t - 1.
    """
    if logits.dim() == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    logits = logits.float() if torch.finfo(logits.dtype).bits < 32 else logits
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="sum")
    return F.cross_entropy(logits, labels, reduction="sum")


def evaluate(
    model: nn.Module, split: Split, task: Task, batch_size: int, device: torch.device, graphs: Graphs | None = None
) -> dict[str, float]:
    """Loss and the task's metric (and F1 beside accuracy for two classes) over a split.

    Args:
        graphs: of evaluations of this model before; None is eager.

    Returns:
        ``loss`` (mean over examples) and one entry a metric.
    """
    total, predictions = 0.0, torch.empty(len(split))
    # Rows of similar length together have the least padding; the result does not depend on their order.
    order = sorted(range(len(split)), key=lambda index: len(split.input_ids[index]))

    def predict(logits: Tensor) -> Tensor:
        return (logits.squeeze(-1) if task.num_labels == 1 else logits.argmax(dim=-1)).float()

    for rows, predicted, loss in _forward(model, split, order, batch_size, graphs or Graphs(device, "off"), predict):
        total += loss
        predictions[torch.tensor(rows)] = predicted.cpu()
    expected = split.labels.numpy()
    found = predictions.numpy() if task.num_labels == 1 else predictions.long().numpy()
    result = {"loss": total / len(split), task.metric: metrics.compute(task.metric, found, expected)}
    if task.metric == "accuracy" and task.num_labels == 2:
        result["f1"] = metrics.compute("f1", found, expected)
    return result


def evaluate_causal(
    model: nn.Module, split: Examples, batch_size: int, device: torch.device, graphs: Graphs | None = None
) -> dict[str, float]:
    """Mean cross entropy of a causal language model over the predicted tokens of a split, in nats.

    Args:
        graphs: of evaluations of this model before; None is eager.

    Returns:
        ``loss``.
    """
    rows = range(len(split))
    losses = _forward(
        model, split, rows, batch_size, graphs or Graphs(device, "off"), lambda logits: logits.new_empty(0)
    )
    return {"loss": sum(loss for *_, loss in losses) / split.targets(rows)}


@torch.no_grad()
def _forward(
    model: nn.Module,
    split: Examples,
    order: Sequence[int],
    batch_size: int,
    graphs: Graphs,
    predict: Callable[[Tensor], Tensor],
) -> Iterator[tuple[list[int], Tensor, float]]:
    """Rows, what is predicted from the logits, and summed loss of every batch, in evaluation mode."""

    def call(batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = model(**inputs).logits
        return predict(logits), summed_loss(logits, batch["labels"])

    training = model.training
    model.eval()
    graphs.follow(model)
    for start in range(0, len(order), batch_size):
        rows = list(order[start : start + batch_size])
        batch = padded(split.batch(rows), model) if graphs.active else split.batch(rows)
        (predicted, loss), _ = graphs.run(("evaluation",), batch, call, warm_up=call)
        yield rows, predicted, float(loss)
    model.train(training)
