"""Forward and backward passes of the training loop, eager or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

MODES = ("auto", "off")


class Passes:
    """Runs the passes of one model and one optimizer, batch after batch.

    Args:
        model: its parameters get the gradients.
        loss: from a batch on the model's device to a scalar with a gradient; autocast is its own matter.
        optimizer: steps what the passes leave in ``.grad``.
        mode: ``auto`` or ``off``.
        pad_to: token lengths are rounded up to a multiple of this where graphs are used.
        keep: graphs held at most; the least recently used are dropped.

    Attributes:
        captured: backward passes that were replayed from a graph so far.

    Raises:
        ValueError: on an unknown mode.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[dict[str, Tensor]], Tensor],
        optimizer: Optimizer,
        mode: str = "auto",
        *,
        pad_to: int = 8,
        keep: int = 32,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"graphs={mode!r}; allowed: {', '.join(MODES)}.")
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.captured = 0

    def backward(self, batch: Mapping[str, Tensor], *, eager: bool = False) -> Tensor:
        """Forward and backward pass of a batch; gradients are added to ``.grad``.

        Args:
            batch: the model's inputs and labels, ``(rows, tokens)`` or ``(rows,)``, and whatever else the loss takes.
            eager: not from a graph, nor captured.

        Returns:
            The loss, detached.
        """
        loss = self.loss(dict(batch))
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """The optimizer's step; all gradients are forgotten after it."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forget(self) -> None:
        """Drop all graphs: parameters or bases have been replaced."""
