"""Floating point operations of a training step, by formula from the architecture.

For a linear layer ``(o, i)`` and each token: forward 2 o i, gradient of the input 2 o i, gradient of the weight 2 o i
where it trains (as in Kaplan et al., https://arxiv.org/abs/2001.08361, section 2.1). The last term is another one for a
target matrix, with k kept entries, a core of r x c, and a LoRA rank q:

    full, meprop     2 o i
    lora             6 q (o + i), and no gradient of the frozen weight
    folded           2 o i; for V G U^T each side where it is cheaper, 2 i^2 a token or 2 o i^2 a step, and 2 o^2 a
                     token or 2 i o^2 a step; once a step at most 2 o i (o + i) to fold the update back
    rotated          2 o i + 4 (o^2 + i^2): x U^T, V, and their backward products
    truncated        2 (c i + r o + r c), and once a step the product V_r^T S U_c; with all outputs in the core,
                     2 c (i + o), and once a step S U_c

Attention adds 4 t h a token and block for t tokens a row, three times with its backward pass; gradient checkpointing
one more forward pass. Embeddings, norms, heads on one token, and the selection of entries are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.methods import base_method, build_targets, with_own_choices
from finetune.methods.base import kept_entries
from sparsegrad import core_shape


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


def cost_of(
    plain: nn.Module,
    model: Mapping[str, Any],
    method: Mapping[str, Any],
    protocol: Mapping[str, Any],
    *,
    checkpointing: bool = False,
) -> Cost:
    """Operations of one method on one model.

    Args:
        plain: the model on the meta device; its ``requires_grad`` flags are set.
        model, method, protocol: configuration groups.
        checkpointing: gradient checkpointing of every block.

    Raises:
        ValueError: if the method refuses the configuration.
    """
    protocol = with_own_choices({"method": method, "protocol": protocol})["protocol"]
    targets = build_targets(base_method(method), model, protocol).set_trainable(plain)
    names = {target.name for target in targets}
    blocks = _blocks(plain)
    inside = tuple(f"{name}." for name in blocks)
    forward = train = step = 0.0
    choices: Counter[tuple[float, float]] = Counter()
    for name, layer in plain.named_modules():
        if not isinstance(layer, nn.Linear) or not (name.startswith(inside) or name == "lm_head"):
            continue
        o, i = layer.weight.shape
        forward += 2 * o * i
        train += 4 * o * i
        if name in names:
            token, once = _of_target(method, model, protocol, (o, i))
            train, step = train + token, step + once
            choices.update(_rotations(method, (o, i)))
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


def _of_target(
    method: Mapping[str, Any], model: Mapping[str, Any], protocol: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[float, float]:
    """Operations of a target matrix beyond forward and input gradient: of a token, and of a step."""
    o, i = shape
    base, form = base_method(method), method.get("form", "")
    if base == "lora":
        return 6.0 * model["lora_rank"] * (o + i), 0.0
    if base == "sparsegrad" and form == "truncated":
        k = kept_entries(model["k"], protocol["density"], shape)
        if method.get("core", "square") == "input":  # the core is all outputs times c directions of the input
            c = max(1, k // o)
            return 2.0 * c * (i + o), 2.0 * o * c * i
        r, c = core_shape(k, shape)
        return 2.0 * (c * i + r * o + r * c), 2.0 * min(o * c * (r + i), r * i * (c + o))
    if base == "sparsegrad" and form == "rotated":
        return 2.0 * o * i + 4.0 * (o * o + i * i), 0.0
    if base == "sparsegrad":
        return 2.0 * o * i, 2.0 * o * i * (o + i)
    return 2.0 * o * i, 0.0


def _rotations(method: Mapping[str, Any], shape: tuple[int, int]) -> list[tuple[float, float]]:
    """Of the folded form, each side of V G U^T: operations of a token (the factor), or of a step (the product)."""
    if base_method(method) != "sparsegrad" or method.get("form") != "folded":
        return []
    o, i = shape
    return [(2.0 * i * i, 2.0 * o * i * i), (2.0 * o * o, 2.0 * i * o * o)]


def _blocks(model: nn.Module) -> list[str]:
    """Names of the transformer blocks.

    Raises:
        ValueError: if there are none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no transformer blocks that its time could be calculated from.")
    return found
