"""The preliminary phase (paper, section 3.1): the gradients of the target matrices, as moments for the HOSVD."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsegrad.basis import GradientMoments
from sparsegrad.targets import Target, TargetModules, find_targets

Batch = Mapping[str, Any]


def collect_moments(
    model: nn.Module,
    batches: Iterable[Batch],
    target_modules: TargetModules,
    layers_to_transform: Sequence[int] | None = None,
    *,
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None = None,
    optimizer: Optimizer | None = None,
    on_gradient: Callable[[str, Tensor], None] | None = None,
) -> dict[str, GradientMoments]:
    """Moments of one gradient a batch and target matrix, by layer kind.

    The model runs in training mode. Its weights stay as they are, its modes and ``requires_grad`` come back, its
    gradients are None afterwards. Memory holds one gradient at a time: LLaMa-2's are 180 MB each.

    Args:
        model: a plain model.
        batches: on the model's device; as many as gradients are wanted (30 in the paper, D3).
        target_modules, layers_to_transform: see :func:`sparsegrad.find_targets`.
        loss_fn: of the model and a batch; None takes ``model(**batch).loss``, as transformers give it.
        optimizer: steps between batches, so that the weights move, as in the released code (D5); what it holds is
            trained. None differentiates the targets alone.
        on_gradient: called with the layer kind and each gradient ``(out_features, in_features)``.

    Raises:
        ValueError: if a target is missing, there is no batch or no loss, or a loss or gradient is not finite.
    """
    moments: dict[str, GradientMoments] = {}

    def take(target: Target, gradient: Tensor) -> None:
        if target.kind not in moments:
            moments[target.kind] = GradientMoments(*gradient.shape, device=gradient.device)
        moments[target.kind].update(gradient)
        if on_gradient is not None:
            on_gradient(target.kind, gradient)

    targets = find_targets(model, target_modules, layers_to_transform)
    held = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
    with _differentiating(model, targets, held, take):
        for number, batch in enumerate(batches, 1):
            loss = model(**batch).loss if loss_fn is None else loss_fn(model, batch)
            if loss is None:
                raise ValueError("model(**batch) has no loss: give batches with labels, or a loss_fn.")
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(f"loss is {value} at batch {number}: check the checkpoint and data.")
            loss.backward()
            if optimizer is not None:
                optimizer.step()
            model.zero_grad()
    if not moments:
        raise ValueError("no batch was given: the moments of no gradient have no basis.")
    return moments


@contextmanager
def _differentiating(
    model: nn.Module, targets: Sequence[Target], held: Sequence[Tensor], take: Callable[[Target, Tensor], None]
) -> Generator[None]:
    """Training mode, gradients of the targets and of what is held alone; each target's goes to ``take`` as it comes."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hooks: list[RemovableHandle] = []
    lying: dict[Tensor, list[Target]] = {}
    for target in targets:
        lying.setdefault(target.weight, []).append(target)

    def handed(weight: Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None  # the hook is called once there is one
        for target in lying[weight]:
            matrix = target.matrix(gradient)
            if target.expert is None or matrix.any():  # no token has come to this expert
                take(target, matrix)
        if not held:
            weight.grad = None

    try:
        model.train()
        model.zero_grad()
        model.requires_grad_(False)
        for parameter in (*held, *lying):
            parameter.requires_grad_(True)
        hooks += [weight.register_post_accumulate_grad_hook(handed) for weight in lying]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
