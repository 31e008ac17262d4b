"""Optimizer steps of every method: micro-batches, sum over processes, clipping, schedule, refresh of bases."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.data.examples import Examples
from finetune.training import memory
from finetune.training.graphs import Passes
from finetune.training.losses import causal_outputs, summed_loss
from finetune.training.options import TrainingOptions, learning_rate_factor
from finetune.training.refreshing import GradientCollector, RefreshOptions, renew
from sparsegrad import clip_grad_norm_


class Steps:
    """One optimizer step: micro-batches, sum over processes, clipping, schedule."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        split: Examples,
        options: TrainingOptions,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.wrapped = model, accelerator.prepare_model(model)
        self.optimizer, self.split, self.options, self.accelerator = optimizer, split, options, accelerator
        self.passes = Passes(model, self._loss, optimizer, graphs_mode(options, accelerator))
        self._epoch, self._order = -1, torch.empty(0)
        self._notes: dict[str, int | None] = {}
        self._first = False

    def step(self, step: int, total: int, notes: dict[str, int | None]) -> tuple[Tensor, float]:
        """Do step number ``step`` (from 0); returns the mean loss over its predictions and the seconds it took."""
        options, device = self.options, self.accelerator.device
        started = self._clock(device)
        factor = learning_rate_factor(options.schedule, step, options.warmup_steps, total)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * factor
        mine, scale, size = self._share(step)
        self._notes, self._first = notes, "saved_activations" not in notes
        if self._first:
            memory.reset_peak(device)
        loss = torch.zeros((), device=device)
        for start in range(0, len(mine), size):
            with self._synchronise(start + size >= len(mine)):
                # Hooks count what the first step saves; a graph has none.
                loss += self.passes.backward(self._batch(mine[start : start + size], scale), eager=self._first)
        if self._first:
            notes["gradients"] = memory.gradient_bytes(self.model)
        if options.max_grad_norm is not None:
            clip_grad_norm_(self.model, options.max_grad_norm)
        self.passes.step()
        if memory.peak(device) is not None:
            notes["peak_training"] = max(notes.get("peak_training") or 0, memory.peak(device) or 0)
        return loss, self._clock(device) - started

    def _share(self, step: int) -> tuple[list[int], float, int]:
        """This process' rows of a step, the weight of their summed loss, and the rows of a micro-batch."""
        rows = self._rows(step)
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        # A process without rows of a short last batch computes one, with weight 0: data parallelism waits for it.
        scale = self.accelerator.num_processes / max(1, self.split.targets(rows)) if mine else 0.0
        mine = mine or rows[:1]
        return mine, scale, math.ceil(len(mine) / self.options.accumulation_steps)

    def refresh(self, step: int, options: RefreshOptions) -> None:
        """Renew the bases from the gradients of the batches of this step and the next ones."""
        one = self.options.accumulation_steps == 1 and self.accelerator.num_processes == 1
        self.passes.forget()
        with GradientCollector(self.model, whole_batches=one) as collector:
            for later in range(step, step + options.batches):
                mine, scale, size = self._share(later)
                for start in range(0, len(mine), size):
                    with self._synchronise(False):
                        self._loss(self._batch(mine[start : start + size], scale)).backward()
                collector.end_batch()
                self.optimizer.zero_grad()
        renew(self.model, collector, self.optimizer, options.state)

    def _batch(self, rows: list[int], scale: float) -> dict[str, Tensor]:
        return self.split.batch(rows) | {"scale": torch.tensor(scale, dtype=torch.float64)}

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss times ``scale``, which is a tensor since a graph would keep a number."""
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        labels, scale = batch.pop("labels"), batch.pop("scale")
        with memory.saved_activations(self.model, self._notes, self._first):
            if self.options.logits_chunk is None:
                loss = summed_loss(self.wrapped(**batch).logits, labels)
            else:
                with self.accelerator.autocast():  # the head is called outside of the model, which has its own
                    loss = causal_outputs(self.wrapped, self.model, batch, labels, self.options.logits_chunk).sum()
        return scale.to(loss.dtype) * loss

    def _rows(self, step: int) -> list[int]:
        """Rows of the batch of a step: every epoch is one permutation, drawn from the seed and the epoch."""
        options, examples = self.options, len(self.split)
        epoch, place = divmod(step, math.ceil(examples / options.batch_size))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(examples, generator=generator)
        return self._order[place * options.batch_size : (place + 1) * options.batch_size].tolist()

    def _synchronise(self, last: bool) -> AbstractContextManager[None]:
        """Sum gradients over processes with the last micro-batch only."""
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    @staticmethod
    def _clock(device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


def graphs_mode(options: TrainingOptions, accelerator: Accelerator) -> str:
    """``options.graphs``; several processes sum gradients in hooks, which a graph would not see."""
    return options.graphs if accelerator.num_processes == 1 else "off"
