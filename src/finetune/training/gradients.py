"""The preliminary phase (paper, section 3.1): gradients of the MLP weights, as moments for the HOSVD."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from finetune.data.examples import Examples
from finetune.methods.base import Targets
from finetune.training.evaluation import summed_loss
from sparsegrad import Basis, GradientMoments, Target, hosvd, hosvd_tensorly

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
        right = sum(self.moments[kind].right for kind in kinds)
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
    found, collected, losses = targets.find(model), Collected({}, {}, {}), []
    torch.manual_seed(seed)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    with _keeping_gradients(model, found, collected, options):
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0, fused=True)
        for step in tqdm(range(options.steps), desc="gradients", disable=not progress_bar, leave=False):
            start = step * options.batch_size % len(split)
            rows = order.roll(-start)[: options.batch_size].tolist()
            batch = {name: tensor.to(device) for name, tensor in split.batch(rows).items()}
            labels = batch.pop("labels")
            loss = summed_loss(model(**batch).logits, labels) / max(1, split.targets(rows))
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(f"loss is {value} at preliminary step {step + 1}: check the checkpoint and data.")
            losses.append(value)
            loss.backward()  # every target's hook adds its gradient to the moments
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


@contextmanager
def _keeping_gradients(
    model: nn.Module, found: Sequence[Target], collected: Collected, options: PreliminaryOptions
) -> Iterator[None]:
    """Differentiate the targets (and the rest where an optimizer steps), and take each gradient as it comes.

    A gradient that no optimizer needs is freed at once, so that one is held at a time: LLaMa-2's are 180 MB each.
    """

    def hook(kind: str) -> Callable[[Tensor], None]:
        def keep(weight: Tensor) -> None:
            if kind not in collected.moments:
                collected.moments[kind] = GradientMoments(*weight.shape, device=weight.device)
            collected.moments[kind].update(weight.grad)
            if options.backend == "tensorly":
                collected.stacks.setdefault(kind, []).append(weight.grad.detach().cpu().clone())
            if not options.update:
                weight.grad = None

        return keep

    training, flags = model.training, {p: p.requires_grad for p in model.parameters()}
    for parameter in flags:
        parameter.requires_grad_(options.update)
    for target in found:
        target.module.weight.requires_grad_(True)
    hooks = [t.module.weight.register_post_accumulate_grad_hook(hook(t.kind)) for t in found]
    try:
        model.train()
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        model.train(training)


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
