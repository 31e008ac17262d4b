"""The preliminary phase (paper, section 3.1): the gradients of the target matrices, as moments for the HOSVD."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from sparsegrad.basis import GradientMoments
from sparsegrad.linear import SparseGradLinear
from sparsegrad.quantized import is_quantized
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
    gradients are None afterwards. Memory holds one gradient at a time: LLaMa-2's are 180 MB each. Experts that no token
    of a batch has come to give none.

    Args:
        model: plain, or sparsified (for :func:`sparsegrad.refresh`): the gradients are those of the whole weights, in
            original coordinates, as the weights are now.
        batches: on the model's device; as many as gradients are wanted (30 in the paper, D3).
        target_modules, layers_to_transform: see :func:`sparsegrad.find_targets`.
        loss_fn: of the model and a batch; None takes ``model(**batch).loss``, as transformers give it.
        optimizer: steps between batches, so that the weights move, as in the released code (D5); what it holds is
            trained. None differentiates the targets alone.
        on_gradient: called with the layer kind and each gradient ``(out_features, in_features)``.

    Raises:
        ValueError: if a target is missing, there is no batch or no loss, a loss or gradient is not finite, or no
            gradient comes to a layer kind.
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
    number = 0
    with _differentiating(model, targets, held, take):
        for number, batch in enumerate(batches, 1):
            loss = _loss(model, batch) if loss_fn is None else loss_fn(model, batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(f"loss is {value} at batch {number}: check the checkpoint and data.")
            if loss.requires_grad:
                loss.backward()
            if optimizer is not None:
                optimizer.step()
            model.zero_grad()
    if not number:
        raise ValueError("no batch was given: the moments of no gradient have no basis.")
    if missing := sorted({target.kind for target in targets} - moments.keys()):
        raise ValueError(
            f"no gradient came to layers of kind {', '.join(missing)}: the loss does not depend on them, or what is "
            "around them reads their weights itself, as nn.MultiheadAttention does; there, merge(model) first."
        )
    return moments


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """What a model of transformers gives for a batch with labels."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch is a {type(batch).__name__}: model(**batch).loss takes a mapping; for other batches give "
            "loss_fn, a function of the model and a batch. (batches is an iterable of them, not one batch.)"
        )
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError("model(**batch) has no loss: give batches with labels, or a loss_fn.")
    return loss


@contextmanager
def _differentiating(
    model: nn.Module, targets: Sequence[Target], held: Sequence[Tensor], take: Callable[[Target, Tensor], None]
) -> Generator[None]:
    """Training mode, gradients of the targets and of what is held alone; each target's goes to ``take`` as it comes."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    lying: dict[Tensor, list[Target]] = {}

    def handed(weight: Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None  # the hook is called once there is one
        for target in lying[weight]:
            matrix = target.matrix(gradient)
            if target.expert is None or matrix.any():  # no token has come to this expert
                take(target, matrix)
        if weight not in kept:
            weight.grad = None

    kept = set(held)
    try:
        with ExitStack() as hooks:
            for target in targets:
                weight = _leaf(target, hooks)
                lying.setdefault(weight, []).append(target)
            model.train()
            model.zero_grad()
            model.requires_grad_(False)
            for weight in (*held, *lying):
                weight.requires_grad_(True)
            for weight in lying:
                hooks.callback(weight.register_post_accumulate_grad_hook(handed).remove)
            yield
    finally:
        model.zero_grad()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _leaf(target: Target, hooks: ExitStack) -> Tensor:
    """Whose ``grad`` is the target's: its parameter, or what stands in for it until the hooks are removed."""
    linear = target.module
    if isinstance(linear, SparseGradLinear) or (isinstance(linear, nn.Linear) and is_quantized(linear)):
        return hooks.enter_context(whole_gradient(linear))
    return target.weight


@contextmanager
def whole_gradient(layer: SparseGradLinear | nn.Linear) -> Generator[Tensor]:
    """A leaf whose ``grad`` is that of the whole weight of a layer that has none of its own, from its forward passes.

    Truncated, rotated and quantised layers have none. It is ``(out_features, in_features)``, in float32 at least.
    """
    stored, shape = cast(Tensor, layer.weight), (layer.out_features, layer.in_features)
    dtype = torch.promote_types(stored.dtype, torch.float32) if stored.is_floating_point() else torch.float32
    # Nothing reads its values: they have no memory.
    weight = torch.zeros((), dtype=dtype, device=stored.device).expand(shape).requires_grad_(True)

    def watch(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _Watched.apply(output, given[0], weight)

    hook = layer.register_forward_hook(watch)
    try:
        yield weight
    finally:
        hook.remove()


class _Watched(torch.autograd.Function):
    """An output ``(..., out_features)`` as it is; the weight that made it of an input x is given g^T x."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - autograd calls it with one gradient
        ctx: Any, g: Tensor
    ) -> tuple[Tensor, None, Tensor]:
        precision = torch.promote_types(g.dtype, torch.float32)
        rows, inputs = (t.reshape(-1, t.shape[-1]).to(precision) for t in (g, ctx.saved_tensors[0]))
        return g, None, rows.T @ inputs
