"""Forward and backward passes, and static optimizer steps, replayed from CUDA graphs.

At GLUE's lengths a GPU waits most of a step for Python. A graph launches a whole pass at once, and every method alike
gains. Token lengths are rounded up, so that few graphs serve all batches. A new shape is run once to warm up, with
nothing kept of it, captured, and replayed from then on. Where a capture fails everything is eager from then on, which
one warning says.

When something was captured decides nothing: all passes are replayed but those that are asked to be eager, dropout draws
from torch's generator as in an eager pass, and a learning rate is a tensor in all steps. So a run that was killed, and
captures again when it goes on, ends as one that was not, to the bit where torch's kernels are deterministic. A run
without graphs is equal to rounding: it has other padding, and where nothing is masked models skip the mask, which they
can't look at while they are captured.

All graphs add to one set of gradient tensors, which stays allocated for the whole run, during the optimizer's step too.
The memory of replayed passes is reserved once, and counts in the allocator's peak when it is captured, not later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from finetune.training.capture import KEEP, MODES, Batch, Graphs, Recorder
from finetune.training.padding import PAD_TO, padded
from sparsegrad import SparseGradAdamW, sparsegrad_layers

__all__ = ["MODES", "Passes", "is_static"]


class Passes:
    """Runs the passes of one model and one optimizer, batch after batch.

    Args:
        model: its parameters get the gradients.
        loss: from a batch on the model's device to a scalar with a gradient; autocast is its own matter.
        optimizer: steps what the passes leave in ``.grad``.
        mode: ``auto`` or ``off``; off is eager, and pads nothing.
        pad_to: token lengths are rounded up to a multiple of this where graphs are used.
        keep: graphs held at most; the least recently used are dropped.
        recorder: in the place of CUDA's.

    Attributes:
        captured: backward passes that were replayed from a graph so far.

    Raises:
        ValueError: on an unknown mode.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Batch], Tensor],
        optimizer: Optimizer,
        mode: str = "auto",
        *,
        pad_to: int = PAD_TO,
        keep: int = KEEP,
        recorder: Recorder | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self._graphs = Graphs(device, mode, keep=keep, recorder=recorder)
        # Not tried: the capture would fail.
        if waits := [why for layer in sparsegrad_layers(model).values() if (why := layer.pass_waits_for)]:
            self._graphs.give_up(waits[0])
        self._model, self._loss, self._optimizer, self._pad_to = model, loss, optimizer, pad_to
        self._pads, self._static = self._graphs.active, self._graphs.active and is_static(optimizer)
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups] if self._static else []
        self._parameters = _trained(model)
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self.captured = 0

    def backward(self, batch: Mapping[str, Tensor], *, eager: bool = False) -> Tensor:
        """Forward and backward pass of a batch; gradients are added to ``.grad``.

        Args:
            batch: the model's inputs and labels, ``(rows, tokens)`` or ``(rows,)``, and whatever else the loss takes,
                on any device.
            eager: not from a graph, nor captured.

        Returns:
            The loss, detached.
        """
        if self._pads:
            batch = padded(batch, self._model, self._pad_to)
        if not self._graphs.active:
            return self._pass(False, self._graphs.placed(batch))
        first = self._attach()
        loss, replayed = self._graphs.run(
            ("backward", first, self._model.training),
            batch,
            partial(self._pass, first),
            warm_up=partial(self._warm_up, first),
            capture=partial(self._captured, first),
            eager=eager,
        )
        if not replayed:
            self._adopt()
            return loss
        self.captured += 1
        return loss.clone()

    def step(self) -> None:
        """The optimizer's step; all gradients are forgotten after it."""
        if self._static and self._graphs.active:
            for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
                rate.fill_(group["lr"])
            own = bool(self._buffers) and all(p.grad is buffer for p, buffer in self._buffers.items())
            lazy = self._optimizer if isinstance(self._optimizer, SparseGradAdamW) else None
            state = lazy.reserve() if lazy else ()
            _, replayed = self._graphs.run(("step", state), {}, self._static_step, eager=not own)
            if lazy and replayed:
                lazy.refuse_non_finite()
        else:
            self._optimizer.step()
        self._optimizer.zero_grad()

    def forget(self) -> None:
        """Drop all graphs and gradients' tensors: parameters, bases or the optimizer's state have been replaced."""
        self._graphs.forget()
        self._parameters, self._buffers = _trained(self._model), {}

    def _attach(self) -> bool:
        """Put the gradients' tensors in their places; returns whether this is the first pass of a step."""
        first = all(p.grad is None for p in self._parameters)
        for parameter, buffer in self._buffers.items():
            if not first and parameter.grad is not buffer:
                buffer.zero_() if parameter.grad is None else buffer.copy_(parameter.grad)
            parameter.grad = buffer
        return first

    def _pass(self, first: bool, batch: Batch) -> Tensor:
        for parameter in self._parameters if self._buffers else ():  # an attempt before may have left others
            parameter.grad = self._buffers.get(parameter)
        if first and self._buffers:
            torch._foreach_zero_(list(self._buffers.values()))  # pyright: ignore[reportPrivateImportUsage]
        loss = self._loss(batch)
        loss.backward()
        return loss.detach()

    def _captured(self, first: bool, batch: Batch) -> Tensor:
        loss = self._pass(first, batch)
        self._gradients()
        return loss

    def _warm_up(self, first: bool, batch: Batch) -> None:
        """A pass whose gradients are thrown away; the first one makes the tensors that all graphs will add to."""
        if first and self._buffers:
            self._loss(batch).backward()  # what is added to them here is zeroed before the next pass
            return
        kept = {p: p.grad for p in self._parameters}
        try:
            for parameter in kept:
                parameter.grad = None
            self._loss(batch).backward()
            if not self._buffers:
                self._buffers = self._gradients()
                for parameter, buffer in self._buffers.items():
                    held = kept[parameter]
                    kept[parameter] = buffer.zero_() if held is None else buffer.copy_(held)
        finally:
            for parameter, gradient in kept.items():
                parameter.grad = gradient

    def _adopt(self) -> None:
        """After an eager pass: its gradients are the tensors that all graphs will add to."""
        try:
            self._buffers = self._gradients() if self._graphs.active else {}
        except ValueError as error:
            self._buffers = {}
            self._graphs.give_up(str(error))

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        """What lies in ``.grad``.

        Raises:
            ValueError: if it is not what graphs can add to.
        """
        found = {p: p.grad for p in self._parameters if p.grad is not None}
        if any(type(g) is not Tensor or g.layout != torch.strided for g in found.values()):
            raise ValueError("gradients are selected in the backward pass")
        if self._buffers and any(g is not self._buffers.get(p) for p, g in found.items()):
            raise ValueError("which parameters get a gradient changes from pass to pass")
        return found

    def _static_step(self, _: Batch) -> None:
        """A step whose learning rates are read from the device."""
        groups = self._optimizer.param_groups
        kept = [{name: group[name] for name in ("lr", "capturable") if name in group} for group in groups]
        capturing = self._graphs.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group |= {"lr": rate} | ({"capturable": capturing} if "capturable" in group else {})
            self._optimizer.step()
        finally:  # checkpoints hold plain numbers
            for group, values in zip(groups, kept, strict=True):
                group |= values


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def is_static(optimizer: Optimizer) -> bool:
    """Whether a step does the same work on the same tensors every time, so that a graph can hold it."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    if isinstance(optimizer, SparseGradAdamW):
        return optimizer.capturable
    return type(optimizer) is AdamW and all(group["fused"] for group in optimizer.param_groups)
