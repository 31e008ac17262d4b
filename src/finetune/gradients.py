"""The preliminary phase (paper, section 3.1): gradients of the MLP weights, as moments for the HOSVD."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from finetune.data.glue import Split
from finetune.evaluation import summed_loss
from finetune.methods.base import Targets
from sparsegrad import Basis, GradientMoments, hosvd, hosvd_tensorly

BACKENDS = ("moments", "tensorly")


@dataclass(frozen=True)
class PreliminaryOptions:
    """How gradients are collected; the values stand in ``conf/protocol``.

    Attributes:
        steps: batches (30 in the paper's text, 11 in the released code: D3).
        batch_size: examples a batch.
        update: step AdamW on the whole model between batches, as the released code does (D5); else the weights stay.
        learning_rate: for ``update``.
        backend: ``moments`` (streamed, memory independent of the steps) or ``tensorly`` (keeps every gradient).
    """

    steps: int
    batch_size: int
    update: bool = False
    learning_rate: float = 1e-5
    backend: str = "moments"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"preliminary steps={self.steps}, batch_size={self.batch_size}; both must be at least 1.")
        if self.backend not in BACKENDS:
            raise ValueError(f"hosvd={self.backend!r}; allowed: {', '.join(BACKENDS)}.")


@dataclass
class Collected:
    """What a collection leaves: moments by layer kind (or stacked gradients for TensorLy), and facts for the record."""

    moments: dict[str, GradientMoments]
    stacks: dict[str, list[Tensor]]
    facts: dict[str, Any]

    def bases(self) -> dict[str, Basis]:
        """HOSVD bases by layer kind, float64."""
        if self.stacks:
            return {kind: hosvd_tensorly(torch.stack(stack)) for kind, stack in self.stacks.items()}
        return {kind: hosvd(moments) for kind, moments in self.moments.items()}


def collect(
    model: nn.Module,
    split: Split,
    targets: Targets,
    options: PreliminaryOptions,
    *,
    seed: int,
    device: torch.device,
    keep_weights: bool = False,
    progress_bar: bool = True,
) -> Collected:
    """Collect one gradient a batch and target matrix.

    Args:
        model: plain; it is not changed (a copy is used) unless ``keep_weights``.
        split: training rows; batches are drawn as in training, from the seed.
        targets: the matrices; only they are differentiated, unless ``options.update``.
        seed: of data order and dropout.
        device: where gradients and moments live.
        keep_weights: leave the stepped weights in the model, as the released code does (D5).

    Raises:
        ValueError: if a gradient is not finite, or a target is missing.
    """
    model = (model if keep_weights else copy.deepcopy(model)).to(device).train()
    found = targets.find(model)
    for parameter in model.parameters():
        parameter.requires_grad_(options.update)
    for target in found:
        target.module.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0, fused=True)
    collected = Collected({}, {}, {})
    torch.manual_seed(seed)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    losses = []
    for step in tqdm(range(options.steps), desc="gradients", disable=not progress_bar, leave=False):
        start = step * options.batch_size % len(split)
        rows = order.roll(-start)[: options.batch_size].tolist()
        batch = {name: tensor.to(device) for name, tensor in split.batch(rows).items()}
        labels = batch.pop("labels")
        loss = summed_loss(model(**batch).logits, labels) / len(rows)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"loss is {value} at preliminary step {step + 1}: check the checkpoint and data.")
        losses.append(value)
        loss.backward()
        for target in found:
            _keep(collected, target.kind, target.module.weight.grad, options.backend)
        if options.update:
            optimizer.step()
        optimizer.zero_grad()
    collected.facts = {
        "gradients": {kind: moments.count for kind, moments in collected.moments.items()},
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "seed": seed,
    }
    return collected


def _keep(collected: Collected, kind: str, gradient: Tensor, backend: str) -> None:
    if kind not in collected.moments:
        collected.moments[kind] = GradientMoments(*gradient.shape, device=gradient.device)
    collected.moments[kind].update(gradient)
    if backend == "tensorly":
        collected.stacks.setdefault(kind, []).append(gradient.detach().cpu().clone())


def pack(collected: Collected) -> dict[str, Tensor]:
    """Tensors of a collection for a file: ``left``, ``right`` and, for TensorLy, ``stack``, by layer kind."""
    tensors = {}
    for kind, moments in collected.moments.items():
        tensors |= {f"{kind}.left": moments.left, f"{kind}.right": moments.right}
    return tensors | {f"{kind}.stack": torch.stack(stack) for kind, stack in collected.stacks.items()}


def unpack(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Collected:
    """The inverse of :func:`pack`."""
    collected = Collected({}, {}, dict(facts))
    for kind, count in facts["gradients"].items():
        left, right = tensors[f"{kind}.left"], tensors[f"{kind}.right"]
        moments = GradientMoments(left.shape[0], right.shape[0])
        moments.left, moments.right, moments.count = left, right, count
        collected.moments[kind] = moments
        if f"{kind}.stack" in tensors:
            collected.stacks[kind] = list(tensors[f"{kind}.stack"])
    return collected
