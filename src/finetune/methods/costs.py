"""What training one target matrix ``(out_features, in_features)`` costs, and the peaks of memory that follow from it.

Every method says for itself what a matrix costs (:class:`finetune.methods.base.Method`); what is common stands here.
N positions a batch (rows times padded tokens), a widest target matrix ``(o, i)`` with wide = max(o, i) and
narrow = min(o, i), a bytes an activation (4, or 2 under autocast):

    resident     parameters + optimizer state + bases + buffers
    training     resident + max(saved activations + backward, gradients + step)
    backward     the method's; at least a N (wide + narrow): gradients of an MLP's inner activations, when everything is
                 still saved
    step         the larger of folding back and, where selection waits for the step, selection
    evaluation   resident + autocast's copies of weights + the method's; at least a N (2 wide + 3 narrow)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.methods.base import Method

Shape = tuple[int, int]

RESIDENT = ("parameters", "optimizer_state", "bases", "buffers")
"""Components that are there all the time; gradients and saved activations come and go within a step."""


@dataclass(frozen=True)
class Operations:
    """Floating point operations of a training step for one matrix, beyond ``4 o i`` a token.

    Those are its product and its input's gradient, which every method has.

    Attributes:
        token: of every token.
        step: of every optimizer step, whatever its batch.
        choices: (operations of a token, operations of a step): the cheaper of both is done.
    """

    token: float
    step: float = 0.0
    choices: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class MatrixMemory:
    """Bytes of one matrix while it trains, the matrix itself and its bases left out.

    Attributes:
        gradient: from the backward pass to the step.
        state: of the optimizer.
        selection: beside the gradient while its entries are selected.
        folding: while a step is folded back, all gradients freed.
        together: matrices of one shape, at most, that are selected and folded back at once.
    """

    gradient: int
    state: int
    selection: int = 0
    folding: int = 0
    together: int = 1


def of_a_step(method: Method, shapes: Sequence[Shape]) -> tuple[int, int]:
    """Bytes of selection and of folding back, of the matrices that need most at once."""
    counts = {shape: shapes.count(shape) for shape in dict.fromkeys(shapes)}
    memory = {shape: method.memory(shape) for shape in counts}
    groups = [(min(counts[shape], one.together), one) for shape, one in memory.items()]
    return max(n * one.selection for n, one in groups), max(n * one.folding for n, one in groups)


def predicted_peaks(
    method: Method, components: Mapping[str, int], shapes: Sequence[Shape], *, positions: int, width: int
) -> dict[str, int]:
    """Peaks of training and evaluation with one backward pass a step, in bytes, by the formulas of this module.

    Args:
        method: whose matrices they are.
        components: ``parameters``, ``gradients``, ``optimizer_state``, ``bases``, ``saved_activations``; ``buffers``
            and ``weight_copies`` where there are any.
        shapes: of the target matrices.
        positions: N.
        width: bytes of an activation.

    Returns:
        ``peak_training`` and ``peak_evaluation``.
    """
    shape = max(shapes, key=lambda shape: shape[0] * shape[1])
    selection, folding = of_a_step(method, shapes)
    step = max(folding, 0 if method.selects_in_backward else selection)
    backward = method.backward_bytes(shape, positions, width)
    resident = sum(components.get(name, 0) for name in RESIDENT)
    moving = max(components["saved_activations"] + backward, components["gradients"] + step)
    evaluation = method.evaluation_bytes(shape, positions, width) + components.get("weight_copies", 0)
    return {"peak_training": resident + moving, "peak_evaluation": resident + evaluation}
