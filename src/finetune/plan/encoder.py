"""Memory of fine-tuning a classifier on one device, calculated: the components on fake tensors, the peak by formula.

Components as in :mod:`finetune.plan.training_memory` (bytes of parameters, gradients, optimizer state with the
share of entries that lazy Adam touches, bases), activations as autograd saves them (:mod:`finetune.plan.activations`),
and from them the peak by :mod:`finetune.efficiency.prediction`; the efficiency stage compares it with the allocator's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.efficiency.prediction import predict
from finetune.efficiency.variants import Variant, make_model
from finetune.methods import base_method, build_method, with_own_choices
from finetune.methods.base import kept_entries
from finetune.plan import activations


def classifier_memory(
    method: Mapping[str, Any],
    model: Mapping[str, Any],
    protocol: Mapping[str, Any],
    *,
    rows: int,
    tokens: int,
    precision: str,
    touched: float,
    num_labels: int = 2,
) -> dict[str, int]:
    """Bytes while one method trains a classifier.

    Args:
        method, model, protocol: configuration groups; ``model.architecture`` is what is built.
        rows, tokens: of a batch; one backward pass a step.
        precision: ``fp32``, or ``bf16`` autocast; weights are float32.
        touched: share of a matrix that lazy Adam has touched in the end.

    Returns:
        ``parameters``, ``gradients``, ``optimizer_state``, ``bases``, ``saved_activations`` and ``peak_training``. Of
        truncated layers they are those of folded ones, of frozen target matrices those of trained ones: upper bounds.

    Raises:
        ValueError: if the method refuses the configuration.
    """
    protocol = with_own_choices({"method": method, "protocol": protocol})["protocol"]
    base = base_method(method)
    plain = make_model(model["architecture"], num_labels, "meta")
    total = sum(p.numel() for p in plain.parameters())
    chosen = build_method({"dropout": 0.0} | dict(method), model, protocol, bases={}, one_backward_a_step=True)
    targets = chosen.targets.set_trainable(plain)
    shapes = [tuple(target.module.weight.shape) for target in targets]
    kinds = {target.kind: tuple(target.module.weight.shape) for target in targets}
    entries, kept = [o * i for o, i in shapes], [chosen.entries(shape) for shape in shapes]
    trainable = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    around = trainable - sum(entries)
    lazy = base == "sparsegrad" or (base == "meprop" and protocol["meprop_optimizer"] == "lazy_adam")
    touched_entries = [max(k, round(touched * n)) for k, n in zip(kept, entries, strict=True)]
    adapters = sum(kept) if base == "lora" else 0
    trained = around + (adapters if base == "lora" else sum(entries))
    state = 16 * sum(touched_entries) if lazy else 8 * (trained - around)
    gradients = 12 * sum(kept) if base == "sparsegrad" else 4 * (trained - around)
    components = {
        "parameters": 4 * (total + adapters),
        "gradients": 4 * around + gradients,
        "optimizer_state": 8 * around + state,
        "bases": sum(4 * (o * o + i * i) for o, i in kinds.values()) if base == "sparsegrad" else 0,
        "buffers": 0,
        "saved_activations": activations.measure_classifier(plain, rows, tokens, precision=precision),
    }
    form = {"sparsegrad": "folded"}.get(base, "")
    peaks = predict(
        Variant(base, base, form),
        components | {"weight_copies": 0},
        shapes,
        positions=rows * tokens,
        kept=kept_entries(model["k"], protocol["density"], shapes[0]),
        precision=precision,
    )
    del components["buffers"]
    return components | {"peak_training": peaks["peak_training"]}
