"""One repetition of the rotation's record: one start, trained with each precision of the rotation in turns."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.efficiency.machine import seconds_of
from finetune.efficiency.rotation_table import GRADIENT, REFERENCE
from finetune.efficiency.timing import Batch
from finetune.efficiency.variants import mean_loss
from finetune.training.evaluation import evaluate
from sparsegrad import (
    Basis,
    SparseGradAdamW,
    collect_moments,
    entries_for_density,
    find_targets,
    hosvd,
    merge,
    param_groups,
    sparsegrad_layers,
    sparsify,
    top_k,
)

if TYPE_CHECKING:  # reading a task needs pyarrow
    from finetune.data.glue import Split, Task

ROTATIONS = (REFERENCE, "tf32", "bf16")
TURN = 10  # steps of one precision before the next one's turn
LAST = 20  # steps whose mean is the training loss at the end


class Trained(NamedTuple):
    """A model in the folded form and its optimizer."""

    model: nn.Module
    optimizer: SparseGradAdamW


@dataclass(frozen=True)
class Layers:
    """What is trained by selected entries.

    Attributes:
        targets: layer kind -> regular expression of module names.
        blocks: indices of the blocks to take; None takes all.
        bases: by layer kind, float64.
        k: entries selected from a matrix, by layer kind.
    """

    targets: Mapping[str, str]
    blocks: Sequence[int] | None
    bases: Mapping[str, Basis]
    k: Mapping[str, int]

    def trainee(self, plain: nn.Module, rotation: str, learning_rate: float) -> Trained:
        """A copy of a plain model, ready to train."""
        model = copy.deepcopy(plain)
        sparsify(model, self.bases, self.k, self.targets, self.blocks, form="folded", rotation=rotation)
        fused = next(model.parameters()).is_cuda
        return Trained(model.train(), SparseGradAdamW(param_groups(model), lr=learning_rate, fused=fused))


def repetition(
    plain: nn.Module,
    task: Task,
    splits: Mapping[str, Split],
    targets: Mapping[str, str],
    blocks: Sequence[int] | None,
    *,
    rotations: Sequence[str],
    steps: int,
    looks: Sequence[int],
    batch_size: int,
    gradients: int,
    density: float,
    learning_rate: float,
    precision: str,
    seed: int,
) -> dict[str, Any]:
    """Train with each rotation and compare what is selected.

    Args:
        plain: the start, on its device.
        looks: steps taken before each comparison.

    Returns:
        ``rotations`` (what :func:`_outcome` gives, by name) and ``looks`` (what :func:`selections` gives, by step).
    """
    device = next(plain.parameters()).device
    batches = [
        {name: tensor.to(device) for name, tensor in splits["train"].batch(rows).items()}
        for rows in draw(len(splits["train"]), steps, batch_size, seed)
    ]
    moments = collect_moments(plain, batches[:gradients], targets, blocks, loss_fn=partial(mean_loss, precision="fp32"))
    k = {target.kind: entries_for_density(density, target.shape) for target in find_targets(plain, targets, blocks)}
    layers = Layers(targets, blocks, {kind: hosvd(found) for kind, found in moments.items()}, k)
    trainees = {rotation: layers.trainee(plain, rotation, learning_rate) for rotation in rotations}
    losses: dict[str, list[Tensor]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    compared = []
    for number, (start, end) in enumerate(pairwise(sorted({*range(0, steps, TURN), *looks, steps, steps + 1}))):
        if start in looks:
            model, batch = trainees[REFERENCE].model, batches[start % steps]
            compared.append({"step": start, "kinds": selections(model, layers, batch, precision, rotations, seed)})
        if start == steps:
            break
        for rotation in rotations if number % 2 == 0 else reversed(rotations):
            calls = _calls(trainees[rotation], batches[start:end], precision, seed + start, losses[rotation])
            seconds[rotation] += seconds_of(calls, device)
    found = {
        rotation: _outcome(losses[rotation], seconds[rotation])
        | {"validation": evaluate(trainees[rotation].model, splits["validation"], task, 128, device).values}
        for rotation in rotations
    }
    return {"rotations": found, "looks": compared}


def draw(rows: int, steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """Rows of every batch: permutations of all rows, end to end."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(rows, generator=generator) for _ in range(-(-steps * batch_size // rows))]
    return [batch.tolist() for batch in torch.cat(order)[: steps * batch_size].split(batch_size)]


def selections(
    model: nn.Module, layers: Layers, batch: Batch, precision: str, rotations: Sequence[str], seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """What each rotation selects from the gradient of one batch, against V G U^T in float64.

    The selection is that of the library: the entries that one step of a fresh optimizer moves.

    Args:
        model: with SparseGrad layers; it stays as it is.

    Returns:
        Layer kind -> rotation -> ``agree`` (share of the k entries that float64 selects too; mean over layers),
        ``least`` (over layers) and ``energy`` (sum of squares of the selected entries over that of float64's, both of
        the exact values; mean over layers). Under autocast there is :data:`GRADIENT` too.
    """
    plain = merge(copy.deepcopy(model))
    exact = dict(_rotated(plain.train(), layers, batch, precision, seed))
    kept: dict[str, dict[str, Tensor]] = {}
    for rotation in rotations:
        trial = layers.trainee(plain, rotation, 0.0)
        _backward(trial.model, batch, precision, seed)
        trial.optimizer.step()
        kept[rotation] = {n: trial.optimizer.touched(layer) for n, layer in sparsegrad_layers(trial.model).items()}
    kinds = {target.name: target.kind for target in find_targets(plain, layers.targets, layers.blocks)}
    shares: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for rotation, found in kept.items():
        for name, indices in found.items():
            shares[kinds[name]][rotation].append(agreement(exact[name], indices))
    if precision != "fp32":  # no dropout: CUDA draws other masks for another dtype
        cast = dict(_rotated(plain.eval(), layers, batch, precision, seed))
        for name, rotated in _rotated(plain, layers, batch, "fp32", seed):
            shares[kinds[name]][GRADIENT].append(agreement(rotated, top_k(cast[name], layers.k[kinds[name]])))
    return {kind: {name: _over_layers(pairs) for name, pairs in found.items()} for kind, found in shares.items()}


def agreement(exact: Tensor, kept: Tensor) -> tuple[float, float]:
    """Share of the kept entries that are among the largest of the exact matrix, and their energy over that of those.

    Args:
        exact: ``(rows, columns)``.
        kept: flat indices ``(k,)``, each once.
    """
    best, values = top_k(exact, len(kept)), exact.flatten()
    energy = values[kept].square().sum() / values[best].square().sum()
    return float(torch.isin(kept, best).double().mean()), float(energy)


def _rotated(plain: nn.Module, layers: Layers, batch: Batch, precision: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """V G U^T in float64 by layer name; the gradients are forgotten."""
    _backward(plain, batch, precision, seed)
    for target in find_targets(plain, layers.targets, layers.blocks):
        gradient = target.weight.grad
        assert gradient is not None  # the weight is trained
        yield target.name, layers.bases[target.kind].rotate(gradient)
    plain.zero_grad()


def _backward(model: nn.Module, batch: Batch, precision: str, seed: int) -> Tensor:
    """Gradients of one batch, with the dropout of this seed; returns the loss."""
    torch.manual_seed(seed)
    loss = mean_loss(model, batch, precision)
    loss.backward()
    return loss.detach()


def _calls(
    trainee: Trained, batches: Sequence[Batch], precision: str, seed: int, losses: list[Tensor]
) -> Iterator[Any]:
    """Forward and backward of a batch, then the optimizer's step, in turn."""

    def backward(batch: Batch, seed: int) -> None:
        losses.append(_backward(trainee.model, batch, precision, seed))

    def step() -> None:
        trainee.optimizer.step()
        trainee.optimizer.zero_grad()

    for number, batch in enumerate(batches):
        yield partial(backward, batch, seed + number)
        yield step


def _outcome(losses: Sequence[Tensor], seconds: Sequence[float]) -> dict[str, Any]:
    """Training losses, their mean at the end, and medians of the times of both halves of a step, in milliseconds."""
    values = torch.stack(list(losses)).tolist()
    halves = [1000 * time for time in seconds[0::2]], [1000 * time for time in seconds[1::2]]
    return {
        "loss": fmean(values[-LAST:]),
        "losses": values,
        "optimizer_ms": median(halves[1]),
        "step_ms": median(sum(pair) for pair in zip(*halves, strict=True)),
    }


def _over_layers(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    shares, energies = zip(*pairs, strict=True)
    return {"agree": fmean(shares), "least": min(shares), "energy": fmean(energies)}
