"""Which rows of the output gradients are zero: what the sparse-by-dense product skips (paper, section 3.3, Figure 3).

The paper's product takes the non-zero rows of the output gradient, one a token. Here they are counted on real batches
and told apart: padding, which every method could leave out, and text, which would be sparsity of the gradient itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune import models
from finetune.data.examples import Examples
from finetune.data.glue import PADDINGS
from finetune.methods import Targets
from finetune.runs.execution import check_length
from finetune.runs.glue import Inputs, targets_of
from finetune.store import records
from finetune.training.evaluation import summed_loss
from finetune.training.loop import make_accelerator
from sparsegrad import Target


def count_zero_rows(
    model: nn.Module, split: Examples, targets: Targets, batches: Sequence[Sequence[int]], device: torch.device
) -> dict[str, Any]:
    """Count the zero rows of the output gradient of every target layer, over batches.

    Args:
        model: plain, as loaded; its gradients are dropped, its weights stay.
        split: rows and their padding.
        targets: the MLP matrices.
        batches: lists of rows.

    Returns:
        ``tokens`` and ``padding_tokens`` of all batches; ``layers``: for every target its ``kind``, ``layer`` (block)
        and ``zero_rows`` in ``padding`` and in ``text``, as counts; ``shares``: zero rows of all layers together as a
        share of all rows, of the padding's rows, and of the text's.

    Raises:
        ValueError: without a batch.
    """
    if not batches:
        raise ValueError("no batch to count zero rows in.")
    found = targets.find(model)
    zero = {target.name: {"padding": 0, "text": 0} for target in found}
    totals = {"padding": 0, "text": 0}
    training = model.training
    model.train()
    with _output_gradients(found) as gradients:
        for rows in batches:
            batch = {name: tensor.to(device) for name, tensor in split.batch(rows).items()}
            labels, padding = batch.pop("labels"), batch["attention_mask"].flatten() == 0
            (summed_loss(model(**batch).logits, labels) / len(rows)).backward()
            model.zero_grad()
            totals["padding"] += int(padding.sum())
            totals["text"] += int((~padding).sum())
            for name, gradient in gradients.items():
                empty = (gradient == 0).all(dim=1)
                zero[name]["padding"] += int((empty & padding).sum())
                zero[name]["text"] += int((empty & ~padding).sum())
    model.train(training)
    layers = [{"kind": t.kind, "layer": t.layer, "name": t.name, "zero_rows": zero[t.name]} for t in found]
    return {
        "tokens": sum(totals.values()),
        "padding_tokens": totals["padding"],
        "layers": layers,
        "shares": _shares(zero, totals),
    }


@contextmanager
def _output_gradients(found: Sequence[Target]) -> Iterator[dict[str, Tensor]]:
    """The latest output gradient ``(tokens, out_features)`` of each layer, by name."""
    latest: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, outputs: latest.__setitem__(name, outputs[0].flatten(0, -2))

    hooks = [target.module.register_full_backward_hook(keep(target.name)) for target in found]
    try:
        yield latest
    finally:
        for hook in hooks:
            hook.remove()


def _shares(zero: Mapping[str, Mapping[str, int]], totals: Mapping[str, int]) -> dict[str, float | None]:
    layers = len(zero)
    counts = {part: sum(found[part] for found in zero.values()) for part in totals}
    of = {part: counts[part] / (layers * total) if total else None for part, total in totals.items()}
    return {"all": sum(counts.values()) / (layers * sum(totals.values())), **of}


def zero_rows_of_tasks(config: Mapping[str, Any], tasks: Sequence[str], path: Path) -> list[str]:
    """Count for every task, with both paddings of ``protocol.padding``; write one JSON file.

    Padding goes to ``protocol.max_length``, or to the model's positions where it has fewer.

    Args:
        config: composed configuration (``conf/zero_rows.yaml``).
        tasks: names.
        path: of the file.

    Returns:
        One line a count, for the log.
    """
    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
    device = make_accelerator(config["device"], "fp32").device
    found: dict[str, dict[str, Any]] = {}
    lines = []
    plain = models.load_classifier(config["model"], config["data"]["root"], 2, config["seed"])
    length = min(config["protocol"]["max_length"], models.positions(plain) or config["protocol"]["max_length"])
    for task in tasks:
        for padding in PADDINGS:
            protocol = dict(config["protocol"]) | {"padding": padding, "max_length": length}
            inputs = Inputs(dict(config) | {"protocol": protocol})
            facts, splits = inputs.task(task)
            model = models.load_classifier(config["model"], config["data"]["root"], facts.num_labels, config["seed"])
            check_length(model, splits.values())
            order = torch.randperm(len(splits["train"]), generator=torch.Generator().manual_seed(config["seed"]))
            batches = [rows.tolist() for rows in order.split(config["batch_size"])[: config["batches"]]]
            counted = count_zero_rows(model.to(device), splits["train"], targets_of(config), batches, device)
            found.setdefault(task, {})[padding] = counted
            shares = ", ".join(f"{n} {s:.1%}" for n, s in counted["shares"].items() if s is not None)
            lines.append(
                f"{task}, padding {padding}: {counted['padding_tokens'] / counted['tokens']:.1%} of the tokens are "
                f"padding; zero rows of {shares}"
            )
    content = {
        "schema": records.SCHEMA,
        "model": config["model"]["name"],
        "max_length": length,
        "batch_size": config["batch_size"],
        "batches": config["batches"],
        "tasks": found,
        "provenance": records.provenance(),
    }
    records.write_json(path, content)
    return lines
