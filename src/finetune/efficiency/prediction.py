"""Peak memory by formula, from the components: what can be planned with, beside what the allocator measured.

N positions a batch (rows times padded tokens), a widest MLP matrix ``(o, i)`` with wide = max(o, i) and
narrow = min(o, i), k kept entries; a bytes an activation (4, or 2 under autocast).

    resident     parameters + optimizer state + bases + buffers
    training     resident + max(saved activations + backward, gradients + step)
    backward     a N (wide + narrow): the gradients of an MLP's inner activations, when everything is still saved; all
                 that full fine-tuning, MeProp and the truncated form have
                 LoRA            + a N narrow: the adapter's share of them
                 rotated         + 10 o i: G_rot, its absolute values and two masks
                 folded          or selection, if that is more: 10 o i, or rotated factors a N (wide + narrow) + 4 o i
    step         MeProp 6 o i: absolute values and two masks; folded 4 (rc + ro + ci + the smaller product), as
                 :mod:`finetune.plan.training_memory` has it; else nothing
    evaluation   resident + autocast's copies of weights + a N (2 wide + 3 narrow); LoRA + a N wide; rotated
                 + 2 a N narrow, and under autocast a copy of the larger basis, 2 wide^2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.efficiency.footprint import RESIDENT
from finetune.efficiency.variants import Variant

Shape = tuple[int, int]


def predict(
    variant: Variant,
    components: Mapping[str, int],
    shapes: Sequence[Shape],
    *,
    positions: int,
    kept: int,
    precision: str,
) -> dict[str, int]:
    """Peaks of training and evaluation, in bytes.

    Args:
        components: of :func:`finetune.efficiency.footprint.measure_memory`.
        shapes: of the target matrices.
        positions: rows times padded tokens of the batch.
        kept: entries kept a matrix; read for SparseGrad.
        precision: ``fp32`` or ``bf16``.
    """
    o, i = max(shapes, key=lambda shape: shape[0] * shape[1])
    wide, narrow = max(o, i), min(o, i)
    unit = positions * (2 if precision == "bf16" else 4)
    backward, step, evaluation = unit * (wide + narrow), 0, unit * (2 * wide + 3 * narrow)
    if variant.method == "lora":
        backward += unit * narrow
        evaluation += unit * wide
    elif variant.method == "meprop":
        step = 6 * o * i
    elif variant.form == "rotated":
        backward += 10 * o * i
        evaluation += 2 * unit * narrow + (2 * wide * wide if precision == "bf16" else 0)
    elif variant.form == "folded":
        backward = max(backward, 10 * o * i, unit * (wide + narrow) + 4 * o * i)
        rows, columns = min(kept, o), min(kept, i)
        step = 4 * (rows * columns + rows * o + columns * i + min(rows * i, columns * o))
    evaluation += components.get("weight_copies", 0)
    resident = sum(components[name] for name in RESIDENT)
    moving = max(components["saved_activations"] + backward, components["gradients"] + step)
    return {"peak_training": resident + moving, "peak_evaluation": resident + evaluation}


def with_ratios(measured: Mapping[str, Any], predicted: Mapping[str, int]) -> dict[str, Any]:
    """The measured memory, the predicted peaks beside it, and predicted over measured."""
    ratios = {name: value / measured[name] for name, value in predicted.items()}
    return {**measured, "predicted": dict(predicted), "predicted_over_measured": ratios}
