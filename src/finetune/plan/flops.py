"""Floating point operations of a training step, by formula from the architecture.

For a linear layer ``(o, i)`` and each token: forward 2 o i, gradient of the input 2 o i, gradient of the weight 2 o i
where it trains (as in Kaplan et al., https://arxiv.org/abs/2001.08361, section 2.1). In place of the last term a target
matrix has what its method says (:meth:`finetune.methods.base.Method.operations`).

Attention adds 4 t h a token and block for t tokens a row, three times with its backward pass; gradient checkpointing
one more forward pass. Embeddings, norms, heads on one token, and the selection of entries are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from finetune.methods import Method


@dataclass(frozen=True)
class Cost:
    """Operations of a model trained by a method.

    Attributes:
        forward: of a token in a forward pass, attention's products left out.
        train: of a token, forward and backward.
        step: of an optimizer step, whatever its batch.
        attention: of a token and each token that it sees, forward.
        attention_passes: how many forward passes of attention a training step is worth.
        blocks: transformer blocks.
        parameters: of the model.
        choices: (operations of a token, operations of a step, how often): the cheaper of both is done.
    """

    forward: float
    train: float
    step: float
    attention: float
    attention_passes: int
    blocks: int
    parameters: int
    choices: tuple[tuple[float, float, int], ...] = ()

    def training(self, rows: int, tokens: float) -> float:
        """Operations of a step on so many rows of so many tokens."""
        rotations = sum(times * min(rows * tokens * a, b) for a, b, times in self.choices)
        return rows * tokens * (self.train + self.attention_passes * self.attention * tokens) + self.step + rotations

    def evaluation(self, rows: int, tokens: float) -> float:
        """Operations of a forward pass on so many rows."""
        return rows * tokens * (self.forward + self.attention * tokens)


def cost_of(plain: nn.Module, method: Method, *, checkpointing: bool = False) -> Cost:
    """Operations of one method on one model.

    Args:
        plain: the model on the meta device; its ``requires_grad`` flags are set.
        checkpointing: gradient checkpointing of every block.

    Raises:
        ValueError: if the method refuses the model.
    """
    names = {target.name for target in method.targets.set_trainable(plain)}
    blocks = list(blocks_of(plain))
    inside, head = tuple(f"{name}." for name in blocks), plain.get_output_embeddings()
    forward = train = step = 0.0
    choices: Counter[tuple[float, float]] = Counter()
    for name, layer in plain.named_modules():
        if not isinstance(layer, nn.Linear) or not (name.startswith(inside) or layer is head):
            continue
        o, i = layer.weight.shape
        forward += 2 * o * i
        train += 4 * o * i
        if name in names:
            own = method.operations((o, i))
            train, step = train + own.token, step + own.step
            choices.update(own.choices)
        elif layer.weight.requires_grad:
            train += 2 * o * i
    return Cost(
        forward=forward,
        train=train + (forward if checkpointing else 0),
        step=step,
        attention=4 * plain.config.hidden_size * len(blocks),
        attention_passes=4 if checkpointing else 3,
        blocks=len(blocks),
        parameters=sum(p.numel() for p in plain.parameters()),
        choices=tuple((token, once, times) for (token, once), times in choices.items()),
    )


def hosvd_operations(shapes: Mapping[str, tuple[int, int]]) -> float:
    """Operations of the eigendecompositions of all kinds' moments: about 9 n^3 each (Golub and Van Loan, 8.3)."""
    return sum(9.0 * (o**3 + i**3) for o, i in shapes.values())


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks by name: what transformers checkpoints, else the layers of the longest list of them.

    Raises:
        ValueError: if there are none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = dict[str, nn.Module](model.named_modules())
    found = {name: modules[name] for name in modules if isinstance(modules[name], GradientCheckpointingLayer)}
    if not found:  # MPNet
        lists = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList)}
        name = max(lists, key=lambda name: len(lists[name]), default=None)
        found = {} if name is None else {f"{name}.{place}": layer for place, layer in enumerate(lists[name])}
    if not found:
        raise ValueError(f"{type(model).__name__} has no transformer blocks that its time could be calculated from.")
    return found
