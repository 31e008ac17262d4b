"""The preliminary phase (paper, section 3.1): gradients of the MLP weights, as moments for the HOSVD."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from finetune.data.examples import Examples
from finetune.methods.base import Targets
from finetune.training.losses import summed_loss
from sparsegrad import Basis, GradientMoments, collect_moments, hosvd, hosvd_tensorly


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


@dataclass
class Collected:
    """What a collection leaves: moments by layer kind (or stacked gradients for TensorLy), and facts for the record."""

    moments: dict[str, GradientMoments]
    stacks: dict[str, list[Tensor]]
    facts: dict[str, Any]

    def bases(self) -> dict[str, Basis]:
        """HOSVD bases by layer kind, float64."""
        return {kind: self.basis(kind) for kind in self.moments}

    def basis(self, kind: str) -> Basis:
        """HOSVD basis of one layer kind, float64, on the moments' device."""
        if self.stacks:
            return hosvd_tensorly(torch.stack(self.stacks[kind]))
        return hosvd(self.moments[kind])

    def share_input(self, kinds: Sequence[str]) -> None:
        """Give layer kinds that read the same input (LLaMa's gate and up) one U: that of their joint gradients.

        The HOSVD of all their gradients stacked along the output has this input factor.

        Raises:
            ValueError: if a kind was not collected, or the moments were not (``hosvd=tensorly``).
        """
        missing = [kind for kind in kinds if kind not in self.moments]
        if missing or self.stacks:
            raise ValueError(
                f"kinds {list(kinds)} can't share an input basis: missing {missing}, hosvd must be moments."
            )
        right = sum((self.moments[kind].right for kind in kinds), torch.zeros((), dtype=torch.float64))
        for kind in kinds:
            self.moments[kind].right = right


def collect(
    model: nn.Module,
    split: Examples,
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
        model: plain; it is not changed (a copy steps, where ``options.update``) unless ``keep_weights``.
        split: training rows; batches are drawn as in training, from the seed.
        targets: the matrices; only they are differentiated, unless ``options.update``.
        seed: of data order and dropout.
        device: where gradients and moments live.
        keep_weights: leave the stepped weights in the model, as the released code does (D5).

    Raises:
        ValueError: if a gradient is not finite, or a target is missing.
    """
    model = copy.deepcopy(model) if options.update and not keep_weights else model
    model = model.to(device)
    stacks: dict[str, list[Tensor]] = {}
    losses: list[Tensor] = []

    def batches() -> Iterator[dict[str, Any]]:
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
        for step in tqdm(range(options.steps), desc="gradients", disable=not progress_bar, leave=False):
            rows = order.roll(-(step * options.batch_size % len(split)))[: options.batch_size].tolist()
            batch = {name: tensor.to(device) for name, tensor in split.batch(rows).items()}
            yield batch | {"targets": split.targets(rows)}

    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "targets")}
        loss = summed_loss(model(**inputs).logits, batch["labels"]) / max(1, batch["targets"])
        losses.append(loss.detach())
        return loss

    def keep(kind: str, gradient: Tensor) -> None:
        stacks.setdefault(kind, []).append(gradient.detach().cpu().clone())

    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0, fused=True)
    moments = collect_moments(
        model,
        batches(),
        targets.target_modules,
        targets.layers_to_transform,
        loss_fn=loss_fn,
        optimizer=optimizer if options.update else None,
        on_gradient=keep if options.backend == "tensorly" else None,
    )
    facts = {
        "gradients": {kind: found.count for kind, found in moments.items()},
        "loss_first": float(losses[0]),
        "loss_last": float(losses[-1]),
        "seed": seed,
    }
    return Collected(moments, stacks, facts)


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
