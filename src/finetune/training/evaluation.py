"""Validation: predictions of a split, loss and metric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data.examples import Examples
from finetune.training import metrics

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


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, task: Task, batch_size: int, device: torch.device) -> dict[str, float]:
    """Loss and the task's metric (and F1 beside accuracy for two classes) over a split.

    Returns:
        ``loss`` (mean over examples) and one entry a metric.
    """
    training = model.training
    model.eval()
    total, predictions = 0.0, torch.empty(len(split))
    for indices in _by_length(split, batch_size):
        batch = {name: tensor.to(device) for name, tensor in split.batch(indices).items()}
        labels = batch.pop("labels")
        logits = model(**batch).logits
        total += float(summed_loss(logits, labels))
        predicted = logits.squeeze(-1) if task.num_labels == 1 else logits.argmax(dim=-1)
        predictions[torch.tensor(indices)] = predicted.float().cpu()
    model.train(training)
    expected = split.labels.numpy()
    found = predictions.numpy() if task.num_labels == 1 else predictions.long().numpy()
    result = {"loss": total / len(split), task.metric: metrics.compute(task.metric, found, expected)}
    if task.metric == "accuracy" and task.num_labels == 2:
        result["f1"] = metrics.compute("f1", found, expected)
    return result


@torch.no_grad()
def evaluate_causal(model: nn.Module, split: Examples, batch_size: int, device: torch.device) -> dict[str, float]:
    """Mean cross entropy of a causal language model over the predicted tokens of a split, in nats.

    Returns:
        ``loss``.
    """
    training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(split), batch_size):
        rows = list(range(start, min(start + batch_size, len(split))))
        batch = {name: tensor.to(device) for name, tensor in split.batch(rows).items()}
        labels = batch.pop("labels")
        total += float(summed_loss(model(**batch).logits, labels))
    model.train(training)
    return {"loss": total / split.targets(range(len(split)))}


def _by_length(split: Split, batch_size: int) -> Iterator[list[int]]:
    """Batches of rows of similar length: least padding; the result does not depend on the order."""
    order = sorted(range(len(split)), key=lambda index: len(split.input_ids[index]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
