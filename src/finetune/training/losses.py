"""Losses of every problem, summed; those of a large vocabulary without all of its logits at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # what models do to logits after their head


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, or squared error for float labels, summed over the batch.

    A sum, so that dividing by the predictions of the *whole* batch makes the step independent of how it is cut into
    micro-batches (transformers' classification heads average each micro-batch: transformers#47688).

    Args:
        logits: ``(batch, num_labels)``, or ``(batch, tokens, vocabulary)`` of a causal language model.
        labels: ``(batch,)``, or ``(batch, tokens)``, -100 where nothing is learned; token t is predicted at t - 1.
    """
    return _loss(logits, labels, "sum")


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """As :func:`summed_loss`, summed over each row: ``(batch,)``."""
    return _loss(logits, labels, "none").view(len(labels), -1).sum(1)


def _loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    if logits.dim() == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    logits = logits.float() if torch.finfo(logits.dtype).bits < 32 else logits
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction=reduction)
    return F.cross_entropy(logits, labels, reduction=reduction)


def causal_outputs(
    forward: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, chunk: int | None
) -> Tensor:
    """Cross entropy of a causal language model, summed over each row: ``(batch,)``.

    With 262,144 words the logits of 4,096 tokens take 4.3 GB in float32, their gradient as much. In chunks only the
    hidden states stay; logits are computed again in the backward pass. The result is equal to rounding.

    Args:
        forward: the model, as data parallelism wraps it.
        model: it, or around it an adapter's.
        inputs, labels: ``(batch, tokens)``; labels are -100 where nothing is learned.
        chunk: tokens whose logits are held at a time; None holds all.

    Raises:
        ValueError: if chunks are asked of a model that changes its logits after its last layer.
    """
    if chunk is None:
        return row_losses(forward(**inputs).logits, labels)
    head = _head(model)
    with _skipped(head):
        hidden = forward(**inputs).logits
    flat, expected = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()

    def part(states: Tensor, own: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), own, reduction="none")

    parts = zip(flat.split(chunk), expected.split(chunk), strict=True)
    losses = [checkpoint(part, states, own, use_reentrant=False, preserve_rng_state=False) for states, own in parts]
    return torch.cat([loss for loss in losses if loss is not None]).view(len(labels), -1).sum(1)


def _head(model: nn.Module) -> nn.Module:
    found = getattr(model, "get_output_embeddings", lambda: None)()
    changes = [
        n for n in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(model.config, n, None)
    ]
    if found is None or changes:
        why = f"config.{changes[0]} changes its logits" if changes else "it has no output embeddings"
        raise ValueError(f"scale.logits_chunk: {why}, so a chunk of them can't be had alone; set it to null.")
    return found


@contextmanager
def _skipped(layer: nn.Module) -> Iterator[None]:
    """Let a layer hand on what it gets."""
    own = layer.__dict__.get("forward")
    layer.forward = lambda states: states
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own
